"""`RewardPool`: worker processes, with time and memory limits, that score samples.

If a call raises, hangs, returns NaN, uses too much memory or kills its worker, only that call
fails: its value is `failed`, the reason is counted and logged, and a worker that hangs, dies or
ran out of memory is replaced. A component that fails too often is an error.
"""

from __future__ import annotations

import json
import logging
import pickle
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdrl.config.user_objects import source_digest
from spmdrl.rewards.functions import RewardSpec, needed_modules
from spmdrl.rewards.judging import (
    Judge,
    RewardJob,
    RewardResult,
    Tell,
    Teller,
    count_failures,
)
from spmdrl.rewards.process import WorkerSettings, receive, send
from spmdrl.rewards.server import RewardServer, ServerEnded, passed_variables
from spmdrl.supervision.pulse import lives

log = logging.getLogger(__name__)

SERVER_S = 1.0  # seconds between checks of the server while workers are busy


@dataclass(kw_only=True)
class _Worker:
    pid: int
    channel: socket.socket
    deadline: float
    ready: bool = False
    call: int | None = None


@dataclass(frozen=True, kw_only=True)
class Called:
    """Calls of a user's function: described in words, the columns that it needs of the row, and
    whether it needs the conversation.
    """

    how: str
    columns: tuple[str, ...]
    takes_messages: bool


class RewardPool(AbstractContextManager["RewardPool"]):
    """Workers that score samples with the components of `specs`. Not for use from two threads.

    Args:
        server: the rank's fork server, which the program starts before anything else.
        specs: the components; their names differ.
        num_workers: most processes; they start when first needed.
        timeout_s: wall-clock seconds of one call of one component.
        memory_mb: MiB that calls may take beyond what the loaded worker has; None: no limit.
        failed: the value of a component whose call failed.
        max_failed: least share of a component's failed calls that is an error, in (0, 1].
        environment: names of this process's variables that functions see besides `server.PASSED`.
        columns: columns of the scored rows, which functions may take by name; None: unknown.
        load_timeout_s: seconds to import the functions.
        output: file for the output that reward functions print; None: it is dropped.

    Raises:
        ValueError: a function cannot be loaded, or not called with the arguments that exist (one
            worker loads them at once to find out); two names are equal; a limit is not positive.
    """

    def __init__(
        self,
        server: RewardServer,
        specs: Sequence[RewardSpec],
        *,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        memory_mb: int | None = 4096,
        failed: float = 0.0,
        max_failed: float = 1.0,
        environment: Sequence[str] = (),
        columns: Collection[str] | None = None,
        load_timeout_s: float = 120.0,
        output: Path | None = None,
    ) -> None:
        names = [spec.name for spec in specs]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"reward components need one name each, at least one: {names}")
        if num_workers < 1 or timeout_s <= 0 or not 0 < max_failed <= 1:
            raise ValueError(
                f"num_workers={num_workers} and timeout_s={timeout_s} must be positive, "
                f"max_failed={max_failed} above 0 and at most 1"
            )
        self._judge = Judge(specs, failed=failed, max_failed=max_failed)
        self.failed, self._teller = failed, Teller(failed)
        self._server = server
        self._specs = tuple(specs)
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        settings = WorkerSettings(
            specs=self._specs,
            columns=None if columns is None else tuple(sorted(columns)),
            cpu_s=timeout_s,
            memory_mb=memory_mb,
            output=None if output is None else str(output.resolve()),
            environment=passed_variables(environment),
        )
        self._settings = pickle.dumps(settings)
        self._callers: tuple[Called | None, ...] = ()
        self._workers: list[_Worker] = []
        self._missed: set[int] = set()
        self._selector = selectors.DefaultSelector()
        server.preload(sorted({name for spec in specs for name in needed_modules(spec)}))
        try:
            self._start_worker()
            while not self._workers[0].ready:
                self._wait({})
        except BaseException:
            self.close()
            raise
        # only once: a file that changes during the run is not loaded again
        self._described = tuple(f"{spec!r} {source_digest(spec.function)}" for spec in specs)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components."""
        return tuple(spec.name for spec in self._specs)

    def describe(self) -> tuple[str, ...]:
        """One text per component, which is equal for equal rewards."""
        return self._described

    @property
    def callers(self) -> Mapping[str, Called]:
        """Calls of users' functions, by component."""
        pairs = zip(self.names, self._callers, strict=True)
        return {name: called for name, called in pairs if called is not None}

    def score(
        self,
        jobs: Sequence[RewardJob],
        *,
        progress: Callable[[int, int], None] | None = None,
        tell: Tell | None = None,
    ) -> list[RewardResult]:
        """Score `jobs`, in order. `progress(done, total)` counts calls.

        Args:
            tell: gets the counts of failures; None: they are logged.

        Raises:
            RewardError: a component fails too often; the text has its first failure.
        """
        results = self._results(jobs, progress)
        (self._teller if tell is None else tell)(count_failures(self._specs, results))
        self._judge.check()
        return results

    def tried(self, jobs: Sequence[RewardJob]) -> list[RewardResult]:
        """Score `jobs` as a trial: nothing is logged or counted, and new workers replace the used
        ones, because functions may keep state between calls.
        """
        results = self._results(jobs, None)
        self._judge.reset()
        for worker in list(self._workers):
            self._stop_worker(worker)
        self._start_worker()  # it loads while the caller continues
        return results

    def _results(
        self, jobs: Sequence[RewardJob], progress: Callable[[int, int], None] | None
    ) -> list[RewardResult]:
        width = len(self._specs)
        total = len(jobs) * width
        pending = deque(range(total))
        replies: dict[int, dict[str, Any]] = {}
        for key, _ in self._selector.select(0):
            self._take(key.data, replies)  # workers that have died since the last batch
        try:
            while len(replies) < total:
                self._feed(jobs, pending)
                before = len(replies)
                self._wait(replies)
                if progress is not None and len(replies) > before:
                    progress(len(replies), total)
        finally:
            # After an exception no worker may reply to an old call.
            for worker in [worker for worker in self._workers if worker.call is not None]:
                self._stop_worker(worker)
        parts = [range(i * width, i * width + width) for i in range(len(jobs))]
        return [self._judge.result([replies[call] for call in part]) for part in parts]

    def look(self) -> None:
        """Log workers that died between calls; new ones start when needed. Any thread may call."""
        for worker in list(self._workers):
            # a worker that is being stopped leaves the list first
            is_idle = worker.ready and worker.call is None
            if is_idle and not lives(worker.pid) and worker in self._workers:
                self._miss(worker)

    def _miss(self, worker: _Worker) -> None:
        if worker.pid not in self._missed:
            self._missed.add(worker.pid)
            log.warning(
                "a reward worker (process %d) died between two calls; another takes its place",
                worker.pid,
            )

    def close(self) -> None:
        """End the workers."""
        for worker in list(self._workers):
            with suppress(ServerEnded):  # its end was theirs
                self._stop_worker(worker)
        self._selector.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_worker(self) -> None:
        pid, channel = self._server.fork()
        deadline = time.monotonic() + self._load_timeout_s
        worker = _Worker(pid=pid, channel=channel, deadline=deadline)
        self._workers.append(worker)
        self._selector.register(channel, selectors.EVENT_READ, worker)
        channel.settimeout(self._load_timeout_s)
        send(channel, self._settings)
        channel.settimeout(self._timeout_s)

    def _stop_worker(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        worker.channel.close()
        return self._server.kill(worker.pid)

    def _feed(self, jobs: Sequence[RewardJob], pending: deque[int]) -> None:
        """Hand a call to every idle worker; start workers while more calls wait."""
        idle = sum(worker.call is None for worker in self._workers)
        for _ in range(min(self._num_workers - len(self._workers), len(pending) - idle)):
            self._start_worker()
        for worker in list(self._workers):
            if not pending or not worker.ready or worker.call is not None:
                continue
            worker.call = pending.popleft()
            worker.deadline = time.monotonic() + self._timeout_s
            row, component = divmod(worker.call, len(self._specs))
            call = (component, self._arguments(jobs[row], component))
            try:
                send(worker.channel, pickle.dumps(call))
            except (BrokenPipeError, ConnectionResetError):
                # It died while idle, so the call did not cause it.
                pending.appendleft(worker.call)
                self._miss(worker)
                self._stop_worker(worker)

    def _arguments(self, job: RewardJob, component: int) -> tuple[Any, ...]:
        called = self._callers[component]
        more = (list(job.messages),) if called is not None and called.takes_messages else ()
        return (job.prompt, job.response, job.answer, job.entry, *more)

    def _wait(self, replies: dict[int, dict[str, Any]]) -> None:
        """Take replies of workers, until one has come or a time limit has passed."""
        if not self._workers:
            return
        limit = min(w.deadline for w in self._workers if w.call is not None or not w.ready)
        for key, _ in self._selector.select(min(SERVER_S, max(0.0, limit - time.monotonic()))):
            self._take(key.data, replies)
        self._server.check()
        now = time.monotonic()
        for worker in list(self._workers):
            busy = worker.call is not None or not worker.ready
            if busy and worker.deadline <= now:
                message = f"no reply in {self._timeout_s} s"
                self._lose(worker, {"reason": "timeout", "message": message}, replies)

    def _take(self, worker: _Worker, replies: dict[int, dict[str, Any]]) -> None:
        try:
            message = receive(worker.channel)
        except TimeoutError:
            message = None
        if message is None:
            self._lose(worker, {"reason": "died"}, replies)
            return
        reply = json.loads(message)
        if not worker.ready:
            if "error" in reply:
                raise ValueError(reply["error"])
            told = reply["callers"]
            self._callers = tuple(map(_called, told))
            worker.ready = True
            return
        assert worker.call is not None, worker
        self._store(worker.call, reply, replies)
        worker.call = None
        if reply.get("reason") == "memory":
            self._stop_worker(worker)  # the memory it holds would fail the next call too

    def _lose(
        self, worker: _Worker, reply: dict[str, Any], replies: dict[int, dict[str, Any]]
    ) -> None:
        """End a worker that died or hangs, and count its call as failed."""
        call, worker.call = worker.call, None
        if call is None and worker.ready:
            self._miss(worker)
        status = self._stop_worker(worker)
        if not worker.ready:
            names = [f"{spec.name} ({spec.function})" for spec in self._specs]
            how = f"ended with exit code {status}" if reply["reason"] == "died" else "hung"
            raise ValueError(
                f"the reward worker {how} while it loaded {', '.join(names)} "
                f"(limit {self._load_timeout_s} s)"
            )
        if status == -signal.SIGXCPU:
            reply = {"reason": "timeout", "message": f"over {self._timeout_s} s of CPU time"}
        elif reply["reason"] == "died":
            reply = {**reply, "message": f"the worker ended with exit code {status}"}
        if call is not None:
            self._store(call, reply, replies)

    def _store(self, call: int, reply: dict[str, Any], replies: dict[int, dict[str, Any]]) -> None:
        replies[call] = self._judge.taken(call % len(self._specs), reply)


def _called(told: Mapping[str, Any] | None) -> Called | None:
    if told is None:
        return None
    return Called(
        how=told["how"], columns=tuple(told["columns"]), takes_messages=told["takes_messages"]
    )
