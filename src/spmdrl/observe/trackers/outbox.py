"""`Outbox`: a tracker with a thread and a bounded queue, so that no step waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Full, Queue

from spmdrl.atomic_files import replace_file
from spmdrl.observe.trackers.protocol import Tracker

log = logging.getLogger(__name__)

SIZE = 256
"""Most entries that wait."""

CLOSE_S = 20.0
"""Seconds that the end of a run waits for a tracker."""

Entry = tuple[int, Callable[[Tracker], None]]


class Outbox:
    """Sends a run's lines of metrics and samples to a tracker, each line once.

    A tracker that raises is not used any more, and one that is too slow misses entries; a warning
    says so once, and how to send what is missing.

    Args:
        name: the tracker, for messages.
        make: makes it, in the thread.
        done: file with the number of lines of metrics.jsonl that the tracker has; None: it is told
            every line that comes.
        remedy: command that sends what is missing.
    """

    def __init__(
        self, name: str, make: Callable[[], Tracker], done: Path | None, remedy: str
    ) -> None:
        self._name, self._make, self._done, self._remedy = name, make, done, remedy
        self._sent = 0 if done is None else lines_sent(done)
        self._queue: Queue[Entry | None] = Queue(SIZE)
        self._thread: threading.Thread | None = None
        self._has_failed = False
        self._misses = False

    def log(
        self,
        number: int,
        step: int,
        values: Mapping[str, float],
        wall_time: float,
        *,
        wait_s: float = 0.0,
    ) -> bool:
        """Log line `number` of metrics.jsonl, counted from 1; returns whether it will be sent.

        Args:
            wait_s: seconds to wait for room in the queue.
        """
        if number <= self._sent:
            return False
        self._put((number, lambda tracker: tracker.log(step, values, wall_time)), wait_s)
        return not self._misses

    def samples(self, step: int, rows: Sequence[Mapping[str, object]], tag: str) -> None:
        if rows:
            self._put((0, lambda tracker: tracker.samples(step, rows, tag)))

    def close(self, wait_s: float = CLOSE_S) -> bool:
        """Wait a while for what is still to be sent; returns whether all of it was."""
        if self._thread is not None:
            try:
                self._queue.put(None, timeout=wait_s)
            except Full:
                self._warn("takes too long")
            self._thread.join(wait_s)
            if self._thread.is_alive():
                self._warn("takes too long")
        return not self._misses

    def _put(self, entry: Entry, wait_s: float = 0.0) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, daemon=True, name=self._name)
            self._thread.start()
        if self._misses:
            return  # a hole would be taken for sent
        try:
            self._queue.put(entry, block=wait_s > 0, timeout=wait_s or None)
        except Full:
            self._warn("takes too long")

    def _send_all(self) -> None:
        entry: Entry | None = (0, lambda tracker: None)
        try:
            tracker = self._make()
            while (entry := self._queue.get()) is not None:
                number, send = entry
                send(tracker)
                if number and self._done is not None:
                    replace_file(self._done, f"{number}\n".encode(), lasting=False)
            tracker.close()
        except Exception as error:  # of a library or a user's class: of any kind
            self._warn(f"failed: {type(error).__name__}: {error}")
            while entry is not None:
                entry = self._queue.get()

    def _warn(self, text: str) -> None:
        self._misses = True
        if not self._has_failed:
            log.warning(
                "tracker %s %s; the run continues without it: %s", self._name, text, self._remedy
            )
        self._has_failed = True


def lines_sent(done: Path) -> int:
    """Read the number of lines that a tracker has; 0 if there is no such file."""
    try:
        return int(done.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
