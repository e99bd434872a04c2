"""Logging of a job with many ranks: rank 0 reports progress, the others only problems."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from spmdrl.observe.progress import write_line

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
