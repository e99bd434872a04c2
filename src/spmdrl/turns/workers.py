"""`Workers`: objects in worker processes of the rank's fork server, asked without waiting.

An object stays in one worker, and a worker does what it is asked in turn. A request that hangs,
grows past the memory or kills its worker fails, alone: other objects of the worker are lost, and
whoever holds them makes them again.
"""

from __future__ import annotations

import json
import pickle
import selectors
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from spmdrl.rewards.server import RewardServer, ServerEnded
from spmdrl.turns.channel import Broken, Channel
from spmdrl.turns.serving import EnvironmentWork

_SERVER_S = 1.0
"""Seconds between checks of the server during a wait."""


@dataclass(kw_only=True, eq=False)
class Held:
    """An object in a worker.

    Args:
        number: its number among all of them.
        is_lost: whether its worker has ended.
    """

    number: int
    worker: _Worker
    is_lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The reply to a request.

    Args:
        tag: what the request was asked with; None if an object was lost that had asked nothing.
        value: JSON values, if it was done.
        reason: "" if it was done; `exception`, `returned`, `memory`, `timeout` or `died` if it
            failed, and `lost` if another object has ended the worker, or nobody did.
        message: what happened, for people.
        is_last: whether the object is lost with it.
    """

    held: Held
    tag: Any = None
    value: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    message: str = ""
    is_last: bool = False


@dataclass(frozen=True, kw_only=True)
class _Asked:
    number: int
    held: Held
    tag: Any


@dataclass(kw_only=True, eq=False)
class _Worker:
    """A worker process.

    Args:
        since: time at which it began with the oldest of `asked`, or to load.
        asked: requests without a reply, oldest first.
        held: its objects.
    """

    pid: int
    channel: Channel
    since: float
    is_ready: bool = False
    asked: deque[_Asked] = field(default_factory=deque)
    held: set[Held] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class About:
    """Facts of a class that its worker tells.

    Args:
        special_tokens: whether `step` is given special tokens.
        saves: whether the state of an object comes with each step.
    """

    special_tokens: bool
    saves: bool


class Workers(AbstractContextManager["Workers"]):
    """Objects of one class in at most `num_workers` processes, which start when they are needed.
    Not for use from two threads.

    Args:
        server: the rank's fork server.
        timeout_s: wall-clock seconds of one request.
        load_timeout_s: seconds to import the class.

    Raises:
        ValueError: the class cannot be loaded (one worker loads it at once to find out), or a limit
            is not positive.
    """

    def __init__(
        self,
        server: RewardServer,
        work: EnvironmentWork,
        *,
        num_workers: int,
        timeout_s: float,
        load_timeout_s: float = 120.0,
    ) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(f"workers={num_workers} and timeout_s={timeout_s} must be positive")
        self._server, self._work, self._settings = server, work, pickle.dumps(work)
        self._num_workers = num_workers
        self._timeout_s, self._load_timeout_s = timeout_s, load_timeout_s
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._replies: list[Reply] = []
        self._num_objects = self._num_asked = 0
        self._is_used = False
        self._about: About | None = None
        server.preload(["spmdrl.turns.serving"])
        try:
            self._start()
            while self._about is None:
                self._look(_SERVER_S)
        except BaseException:
            self.close()
            raise

    @property
    def about(self) -> About:
        assert self._about is not None
        return self._about

    def make(self) -> Held:
        """Choose a worker for another object, the one with the least to do."""

        def load(worker: _Worker) -> tuple[int, int]:
            return len(worker.asked), len(worker.held)

        least = min(self._workers, key=load, default=None)
        if least is None or (len(self._workers) < self._num_workers and load(least) > (0, 0)):
            least = self._start()
        self._num_objects += 1
        held = Held(number=self._num_objects, worker=least)
        least.held.add(held)
        return held

    def ask(self, held: Held, tag: Any, do: str, **values: Any) -> None:
        """Send a request to an object; its reply comes by `poll`, with the tag."""
        assert not held.is_lost, tag
        worker = held.worker
        self._num_asked, self._is_used = self._num_asked + 1, True
        asked = _Asked(number=self._num_asked, held=held, tag=tag)
        request = {"number": asked.number, "object": held.number, "do": do, **values}
        if worker.is_ready and not worker.asked:
            worker.since = time.monotonic()
        worker.asked.append(asked)
        try:
            worker.channel.put(json.dumps(request).encode())
        except Broken:  # the next look reads its end
            if worker.asked[0] is asked:
                worker.asked.clear()  # it had ended before, so this is not the reason
        else:
            self._watch(worker)

    def drop(self, held: Held) -> None:
        """Forget an object, whose worker may continue; replies to what it was asked are dropped."""
        held.worker.held.discard(held)

    def poll(self, wait_s: float) -> list[Reply]:
        """Return replies that have arrived since the last call; if there are none, wait up to
        `wait_s` seconds for one.

        Raises:
            ValueError: a worker could not load the class.
            ServerEnded: the fork server has ended, and all workers with it.
        """
        deadline = time.monotonic() + wait_s
        while True:
            left = 0.0 if self._replies else max(0.0, deadline - time.monotonic())
            self._look(min(left, _SERVER_S))
            replies, self._replies = self._replies, []
            if replies or time.monotonic() >= deadline:
                return replies

    def renew(self) -> None:
        """End all workers and whatever their objects have started; as many new ones start to load,
        for which nobody waits.
        """
        count = len(self._workers)
        for worker in list(self._workers):
            self._stop(worker)
        self._replies, self._is_used = [], False
        for _ in range(count):
            self._start()

    @property
    def is_busy(self) -> bool:
        """Whether some request has no reply yet."""
        return any(worker.asked for worker in self._workers)

    @property
    def is_used(self) -> bool:
        """Whether some worker has been asked for something."""
        return self._is_used

    def close(self) -> None:
        """End the workers."""
        for worker in list(self._workers):
            with suppress(ServerEnded):  # its end was theirs
                self._stop(worker)
        self._selector.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        pid, end = self._server.fork()
        worker = _Worker(pid=pid, channel=Channel(end), since=time.monotonic())
        self._workers.append(worker)
        self._selector.register(worker.channel.socket, selectors.EVENT_READ, worker)
        with suppress(Broken):  # seen by the next look
            worker.channel.put(self._settings)
        return worker

    def _stop(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel.socket)
        worker.channel.close()
        return self._server.kill(worker.pid)

    def _watch(self, worker: _Worker) -> None:
        """Wait for the moment that the rest of a message can be sent, if there is one."""
        events = selectors.EVENT_READ | (worker.channel.has_unsent * selectors.EVENT_WRITE)
        if self._selector.get_key(worker.channel.socket).events != events:
            self._selector.modify(worker.channel.socket, events, worker)

    def _limit(self, worker: _Worker) -> float | None:
        """Return the time at which a worker hangs; None if it has nothing to do."""
        if not worker.is_ready:
            return worker.since + self._load_timeout_s
        return worker.since + self._timeout_s if worker.asked else None

    def _look(self, wait_s: float) -> None:
        """Take what has arrived, after a wait, and end workers that hang."""
        limits = [limit for w in self._workers if (limit := self._limit(w)) is not None]
        if limits:
            wait_s = min(wait_s, max(0.0, min(limits) - time.monotonic()))
        for key, _ in self._selector.select(wait_s):
            self._take(key.data)
        self._server.check()
        now = time.monotonic()
        for worker in list(self._workers):
            limit = self._limit(worker)
            if limit is not None and limit <= now:
                self._lose(worker, "timeout", f"no reply in {self._timeout_s} s")

    def _take(self, worker: _Worker) -> None:
        messages, is_open = worker.channel.take()
        for message in messages:
            problem = self._read(worker, message)
            if problem is not None:
                self._lose(worker, *problem)
                return
        if not is_open:
            self._lose(worker, "died", "")
            return
        with suppress(Broken):  # the next look reads its end
            worker.channel.flush()
        self._watch(worker)

    def _read(self, worker: _Worker, message: bytes) -> tuple[str, str] | None:
        """Read a message; returns why the worker must end after it, if it must."""
        nonsense = "returned", f"the worker sent what is no reply: {message[:80]!r}"
        try:
            reply = json.loads(message)
        except ValueError:
            return nonsense
        if not worker.is_ready:
            if "error" in reply:
                raise ValueError(reply["error"])
            self._about = About(**reply["about"])
            worker.is_ready, worker.since = True, time.monotonic()
            return None
        if not isinstance(reply, dict) or not worker.asked:
            return nonsense
        if reply.get("number") != worker.asked[0].number:
            return nonsense
        if reply.get("reason") == "memory":
            return "memory", str(reply.get("message"))  # what it holds would fail the next one too
        asked = worker.asked.popleft()
        worker.since = time.monotonic()
        if asked.held in worker.held:
            self._replies.append(
                Reply(
                    held=asked.held,
                    tag=asked.tag,
                    value=reply.get("value", {}),
                    reason=reply.get("reason", ""),
                    message=reply.get("message", ""),
                )
            )
        return None

    def _lose(self, worker: _Worker, reason: str, message: str) -> None:
        """End a worker; the request that it was busy with has failed, all its objects are lost."""
        status = self._stop(worker)
        if not worker.is_ready:
            how = f"ended with exit code {status}" if reason == "died" else "hung"
            raise ValueError(
                f"{self._work.key}.kind={self._work.kind}: the worker {how} while it loaded the "
                f"class (limit {self._load_timeout_s} s)"
            )
        if status == -signal.SIGXCPU:
            reason, message = "timeout", f"over {self._timeout_s} s of CPU time"
        elif reason == "died":
            message = f"the worker ended with exit code {status}"
        for held in worker.held:
            held.is_lost = True
        guilty = worker.asked.popleft() if worker.asked else None
        for held in sorted(worker.held, key=lambda held: held.number):
            if guilty is not None and held is guilty.held:
                tag, why, what = guilty.tag, reason, message
            else:
                tag, why, what = None, "lost", ""
            reply = Reply(held=held, tag=tag, reason=why, message=what, is_last=True)
            self._replies.append(reply)
