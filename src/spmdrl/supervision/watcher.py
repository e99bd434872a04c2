"""`Watcher`: a thread of every rank that notices events that the main thread cannot.

It takes requests to stop (signals, stop files, a deadline) and passes them to all ranks through a
key in the store; role calls read `stop_asked` without a collective. It writes the heartbeat, ends a
process that makes no progress, and distinguishes a request to stop from the end of a job whose rank
died: torchrun sends SIGTERM for both.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import Signals as Number
from types import TracebackType

import torch.distributed as dist

from spmdrl.atomic_files import replace_file
from spmdrl.supervision.attempt import Attempt, Outcome
from spmdrl.supervision.error_file import one_line, write_error_file
from spmdrl.supervision.failures import is_lost_peer
from spmdrl.supervision.pulse import DEAD_S, SIGN_S, Pulse, Signs, behind
from spmdrl.supervision.signals import Signals
from spmdrl.supervision.stacks import Stacks
from spmdrl.world import World

TICK_S = 0.5
HEARTBEAT_S, WARDS_S = 5.0, 2.0

EXIT_HUNG, EXIT_LOST = 75, 76
LAUNCHER_S = 3.0
"""Seconds that a rank that lost a peer stays alive, so that its launcher notices that peer first:
torchrun names as root cause the lowest rank that it finds ended in one poll."""

INTERRUPTED = Number.SIGINT.name
"""Reason of a stop by Ctrl-C."""

STOPPING_PHASE, STOPPING_LIMIT_S = "stop", 20.0
"""Phase of the save at a stop, and its limit in seconds: the save would hang if a rank has died."""


class Watcher:
    """Watch over a run, from `__enter__` to `__exit__`.

    Args:
        pulse: this rank's pulse.
        signals: recorder of the signals since the program's start.
        limits: seconds without progress by phase, `default` for the others.
    """

    def __init__(
        self,
        world: World,
        attempt: Attempt,
        pulse: Pulse,
        signals: Signals,
        limits: Mapping[str, float],
    ) -> None:
        self.attempt, self.pulse = attempt, pulse
        self._world, self._signals = world, signals
        self._limits = {STOPPING_PHASE: STOPPING_LIMIT_S, **limits}
        self._stacks = Stacks(attempt.directory / "stacks", world.rank)
        self._store = world.connect(str(attempt.directory))
        self._signs = Signs(self._store, world.rank, world.size)
        self.stop_asked = False
        """A stop was requested on some rank; every rank learns of it within a tick or two."""
        self.stop_by: float | None = None
        """Time to request a stop, in seconds since 1970, so that the save ends in time."""
        self.broken: str | None = None
        """Loss of something that this rank needs, in words: the run saves and ends."""
        self._wards: list[Callable[[], str | None]] = []
        self._signalled: list[int] = []
        """Signals that have not been answered yet."""
        self._failing: set[str] = set()
        self._writes = threading.Lock()
        self._ending = False
        self._terminated = self._lost_peer = self._store_lost = False
        self._next_heartbeat = self._next_armed = self._next_ask = 0.0
        self._thread = threading.Thread(target=self._run, name="spmdrl-watcher", daemon=True)

    def ask(self, reason: str) -> None:
        """Ask all ranks to stop. Only the first request on this rank counts."""
        if self.stop_asked:
            return
        if reason != INTERRUPTED:  # `Signals` has printed a line on it
            _say(f"[rank {self._world.rank}] stop asked for: {reason}")
        self.stop_asked = True
        self._tell("stop", reason)
        if reason == INTERRUPTED and self._world.is_first:
            # now: it may be interrupted again before the save ends
            with self._outliving("writing who asked for the stop"):
                self.write_stopped_by(reason)

    def write_stopped_by(self, reason: str) -> None:
        """Write `stopped_by` of `Attempt`; the main thread and the watcher's both may."""
        with self._writes:
            self.attempt.write_stopped_by(reason)

    def look_after(self, ward: Callable[[], str | None]) -> None:
        """Call `ward` now and then, from the watcher's thread, to check a thread or process of the
        caller: it returns None, or a message if it ended and the run cannot continue without it.
        """
        self._wards.append(ward)

    def look_for_requests(self) -> bool:
        """Look for requests now (rank 0 looks for files); whether a stop was requested."""
        self._look_for_requests()
        if not self._thread.is_alive():
            self._lose("the watcher's thread ended without a word")
        return self.stop_asked or self._signals.noted is not None

    def stop_reason(self) -> str:
        """Reason of the stop, as far as it is known."""
        if not self._store_lost and self._store.check(["stop"]):
            return self._store.get("stop").decode()
        if self._signals.noted is not None:
            return Number(self._signals.noted).name
        return "the job's time is nearly over"

    def agreed(self) -> None:
        """Note that the world has agreed to end the run: signals are no longer requests."""
        self._signals.settle()

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.agreed()
            self._tell(f"ended/{self._world.rank}", "")
            self._wait_for_the_others()
        else:
            self._report(error)
        self._ending = True
        self._thread.join()
        self._stacks.close()
        if error is not None:  # from now on signals act by their defaults
            self._signals.close()

    def _wait_for_the_others(self) -> None:
        """Let rank 0, which may host the store, wait until the others' watchers need it no more."""
        deadline = time.monotonic() + DEAD_S
        others = [f"ended/{rank}" for rank in range(self._world.size)]
        while self._world.is_first and not self._store_lost and time.monotonic() < deadline:
            if self._store.check(others):
                return
            time.sleep(0.01)

    # What happens when this rank fails

    def _report(self, error: BaseException) -> None:
        """Tell the other ranks before this process ends, so that they know why SIGTERM comes."""
        rank = self._world.rank
        if not is_lost_peer(error):
            self._fail(f"rank {rank}: {one_line(error)}")
            with self._outliving("writing the launcher's error file"):
                write_error_file(error)
            return
        # the cause is another rank
        self._lost_peer = True
        deadline = time.monotonic() + DEAD_S + 3 * SIGN_S
        while time.monotonic() < deadline and self.attempt.read_failed() is None:
            time.sleep(TICK_S)
        time.sleep(LAUNCHER_S)
        found = self.attempt.read_failed() or "no rank has said why, and all give signs of life"
        _say(f"[rank {rank}] lost a peer in a collective: {found}")

    def _fail(self, text: str, outcome: Outcome = "crashed") -> None:
        self._tell("failed", text)  # first: a full disk must not keep it from the others
        self._write_end(text, outcome)

    def _write_end(self, text: str, outcome: Outcome) -> None:
        with self._outliving("writing how the attempt ended"):
            self.attempt.write_failed(text)
            self.attempt.write_outcome(outcome)

    def _tell(self, key: str, text: str) -> None:
        """Set a key in the store; the key `news` tells all watchers to look."""
        if self._store_lost:
            return
        try:
            self._store.set(key, text)
            self._store.set("news", "")
        except dist.DistError as error:
            self._lose_store(error)

    def _lose_store(self, error: dist.DistError) -> None:
        """Note that the store's host is gone, and with it the job, which can only end now."""
        self._store_lost = True
        _say(f"[rank {self._world.rank}] the store is gone: {one_line(error)}")

    # The thread

    def _run(self) -> None:
        try:
            while not self._ending:
                self._tick()
        except BaseException as error:  # of any type: nobody else would notice it
            traceback.print_exc()
            self._lose(f"the watcher's thread ended ({one_line(error)})")

    def _tick(self) -> None:
        """Run all parts; a failure in one does not keep the others from running."""
        self._arm()  # first: a run that makes progress lives, whatever happens below
        with self._outliving("waiting for signals"):
            self._signalled += self._signals.wait(TICK_S)
        for part in (self._look, self._check_limits, self._beat, self._ask_wards):
            with self._outliving(part.__name__.strip("_")):
                try:
                    part()
                except dist.DistError as error:
                    self._lose_store(error)

    @contextmanager
    def _outliving(self, work: str) -> Iterator[None]:
        """Survive errors of a shared file system: print each once, and retry at the next tick.

        Only OSError is caught.
        """
        try:
            yield
            self._failing.discard(work)
        except OSError as error:
            if work not in self._failing:
                _say(f"[rank {self._world.rank}] watcher: {work}: {error}; continues without")
            self._failing.add(work)
            time.sleep(TICK_S / 10)

    def _lose(self, what: str) -> None:
        """Note that something vital is gone: all ranks save, then `Lifetime.stop` raises."""
        if self.broken is None:
            self.broken = f"rank {self._world.rank}: {what}"
            self.ask(self.broken)

    def _ask_wards(self) -> None:
        if time.monotonic() < self._next_ask:
            return
        self._next_ask = time.monotonic() + WARDS_S
        for ward in self._wards:
            found = ward()
            if found is not None:
                self._lose(found)

    def _look(self) -> None:
        while self._signalled:
            if self._signalled[0] == Number.SIGTERM:
                self._on_term()
            else:
                self.ask(Number(self._signalled[0]).name)
            self._signalled.pop(0)
        self._look_for_requests()
        if self._store_lost:
            return
        self._signs.give()
        if self._store.check(["news"]):
            self._look_for_news()
        if self._terminated or self._lost_peer:
            self._look_for_the_dead()

    def _look_for_requests(self) -> None:
        """Look for a deadline and stop files; rank 0 does it for all ranks."""
        if not self._world.is_first or self.stop_asked:
            return
        if self.stop_by is not None and time.time() >= self.stop_by:
            self.ask("the job's time is nearly over")
        for file in self.attempt.stop_files():
            with self._outliving(f"looking for {file}"):
                if file.exists():
                    self.ask(request_of(file))

    def _look_for_news(self) -> None:
        if self._store.check(["hung"]):
            self._end_hung(self._store.get("hung").decode(), is_first=False)
        if self._store.check(["beat"]):
            self._next_heartbeat = 0.0
        if self._store.check(["stop"]):
            self.stop_asked = True

    def _on_term(self) -> None:
        """Answer SIGTERM: a scheduler's request, or torchrun's end of a dead rank's peers."""
        if self._store_lost or self._store.check(["failed"]):
            _say(f"[rank {self._world.rank}] SIGTERM after a failure: ends without saving")
            _exit(EXIT_LOST)
        self._terminated = True
        # before looking at all ranks, which may take time: they must learn of it first
        if not self._lost_peer:
            self.ask("SIGTERM")
        self._look_for_the_dead()

    def _look_for_the_dead(self) -> None:
        """End this process if, after SIGTERM or a failed collective, a rank has failed or died."""
        store, dead = self._store, self._signs.dead()
        if dead and not store.check(["failed"]):
            names = ", ".join(f"rank {rank}" for rank in dead)
            self._fail(f"{names}: died without a word (killed?)")
        if store.check(["failed"]):
            text = store.get("failed").decode()
            _say(f"[rank {self._world.rank}] ends without saving: {text}")
            if not self._terminated:
                time.sleep(LAUNCHER_S)
            _exit(EXIT_LOST)

    # Progress

    def _limit(self) -> float:
        return self._limits.get(self.pulse.position.phase, self._limits["default"])

    def _arm(self) -> None:
        if time.monotonic() >= self._next_armed:
            self._next_armed = time.monotonic() + 5
            self._stacks.arm(self._limit() + 60)

    def _check_limits(self) -> None:
        limit = self._limit()
        if time.monotonic() - self.pulse.moved <= limit:
            return
        phase = self.pulse.position.phase
        if phase == STOPPING_PHASE:
            who, key = f"[rank {self._world.rank}]", f"limits.{STOPPING_PHASE}"
            _say(f"{who} the save made no progress for {limit:g} s ({key}): ends")
            self._dump("the save of a stop made no progress")
            _exit(EXIT_HUNG)
        self._tell("beat", "")  # so that the others' heartbeats are fresh, too
        with self._outliving("beat"):
            self._beat(now=True)
        time.sleep(3 * TICK_S)
        found = behind(self._heartbeats(), self._world.size)
        self._end_hung(f"no progress for {limit:g} s in phase {phase}: {found}", is_first=True)

    def _end_hung(self, text: str, *, is_first: bool) -> None:
        self._dump(text)
        if is_first:
            _say(f"[rank {self._world.rank}] hung: {text}")
            self._write_end(text, "hung")
            self._tell("hung", text)
            time.sleep(4 * TICK_S)  # so that the others write stacks before a launcher ends them
        _exit(EXIT_HUNG)

    def _dump(self, title: str) -> None:
        with self._outliving("writing stacks"):
            self._stacks.dump(title)

    def _heartbeats(self) -> dict[int, str]:
        found = {}
        for path in (self.attempt.directory / "heartbeats").glob("rank_*.json"):
            with suppress(OSError):
                found[int(path.stem[5:])] = path.read_text(encoding="utf-8", errors="replace")
        return found

    def _beat(self, *, now: bool = False) -> None:
        if not now and time.monotonic() < self._next_heartbeat:
            return
        self._next_heartbeat = time.monotonic() + HEARTBEAT_S
        line = self.pulse.heartbeat(self._world.rank)
        file = heartbeat_file(self.attempt.directory, self._world.rank)
        replace_file(file, line.encode(), lasting=False)  # every rank, every few seconds


def heartbeat_file(directory: Path, rank: int) -> Path:
    return directory / "heartbeats" / f"rank_{rank:05d}.json"


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # its reader is gone, or it was closed
        print(text, file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    """End the process at once: the main thread may be in a collective that never returns."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    os._exit(code)


def request_of(file: Path) -> str:
    """Return what a stop file asks for: its words, if it has any that can be read, and its path."""
    words = ""
    with suppress(OSError):  # another user's file asks for a stop too
        words = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
    return f"{words[:200]} (the file {file})" if words else f"the file {file}"
