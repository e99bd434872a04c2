"""Logging of a job with many ranks (rank 0 reports progress, the others only problems), and
progress of long work.

On rank 0's terminal progress is a bar. Elsewhere (a log file, a Slurm job) the log reports now and
then how far a long phase is, and long work before the first step in any case (`TimedLines`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)


@contextmanager
def phase_bar(
    name: str, *, is_first: bool, unit: str = "rows", stream: TextIO | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar that vanishes at its end; yields `report(done, total)`, callable at any rate.

    Args:
        name: text before the bar.
        is_first: whether this rank shows it.
        unit: unit of the counts.
        stream: stream to draw on, stderr by default.
    """
    stream = sys.stderr if stream is None else stream
    if not is_first:
        yield lambda done, total: None
        return
    if not stream.isatty():
        yield Lines(name, unit=unit)
        return
    with tqdm(desc=name, unit=unit, file=stream, leave=False, dynamic_ncols=True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


EVERY_S = 30.0
"""Least number of seconds between two lines."""


class Lines:
    """Logs the progress of a phase now and then.

    Args:
        name: name of the phase.
        unit: unit of the counts.
        every_s: least number of seconds between two lines.
    """

    def __init__(self, name: str, *, unit: str = "rows", every_s: float = EVERY_S) -> None:
        self._name, self._unit, self._every_s = name, unit, every_s
        self._began = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said < self._every_s:
            return
        self._said = now
        log.info("%s: %d of %d %s, %d s", self._name, done, total, self._unit, now - self._began)


class TimedLines:
    """Logs the progress of long reading now and then.

    Args:
        what: what is being read, for the log line.
        beat: called at every report of progress.
        every_s: least number of seconds between two lines.
    """

    def __init__(
        self, what: str, beat: Callable[[], None] = lambda: None, every_s: float = EVERY_S
    ) -> None:
        self._what, self._beat, self._every_s = what, beat, every_s
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Report `done` rows of `total`; 0 if the total is not known."""
        self._beat()
        if time.monotonic() - self._said < self._every_s:
            return
        self._said = time.monotonic()
        log.info("reading %s: row %d%s", self._what, done, f" of {total}" if total else "")


class Relay:
    """Passes the progress of work inside a phase to its bar or its lines, if there is a phase."""

    def __init__(self, *, is_first: bool) -> None:
        self._is_first = is_first
        self._report: Callable[[int, int], None] | None = None

    @contextmanager
    def bar(self, name: str, *, unit: str = "rows") -> Iterator[None]:
        """Show a bar while the block runs; `report` moves it."""
        outer = self._report
        with phase_bar(name, is_first=self._is_first, unit=unit) as self._report:
            try:
                yield
            finally:
                self._report = outer

    def report(self, done: int, total: int) -> None:
        if self._report is not None:
            self._report(done, total)


def write_line(line: str, stream: TextIO | None = None) -> None:
    """Print a line above any open bars, to `stream` (stdout by default)."""
    stream = sys.stdout if stream is None else stream
    tqdm.write(line, file=stream)
    stream.flush()


PACKAGE = "spmdrl"

ALIKE = {"alike": True}
"""`extra` of a record that every rank makes alike, of the files that all read: rank 0 shows it."""


class RankHandler(logging.Handler):
    """Writes records to a stream, above open progress bars."""

    def __init__(self, rank: int, stream: TextIO) -> None:
        super().__init__()
        self._rank, self._stream = rank, stream
        prefix = "" if rank == 0 else f"[rank {rank}] "
        self.setFormatter(
            logging.Formatter(f"{prefix}%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        )

    def emit(self, record: logging.LogRecord) -> None:
        if self._rank and "alike" in vars(record):
            return
        write_line(self.format(record), self._stream)


def set_up_logging(
    rank: int, *, level: int = logging.INFO, stream: TextIO | None = None
) -> logging.Logger:
    """Print the package's records from `level` on rank 0, from WARNING on every other rank.

    Lines of other ranks begin with "[rank N]". Libraries print from WARNING everywhere. A second
    call replaces the first.

    Args:
        rank: rank of this process.
        level: lowest level that rank 0 prints.
        stream: stream to print to, stderr by default.

    Returns:
        The package's logger.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, RankHandler)]:
        root.removeHandler(handler)
    root.addHandler(RankHandler(rank, sys.stderr if stream is None else stream))
    root.setLevel(logging.WARNING)
    logger = logging.getLogger(PACKAGE)
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    return logger
