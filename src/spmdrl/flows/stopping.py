"""Requests to stop: SIGTERM, SIGUSR1, or a file `stop` in the run directory."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"


class StopRequest:
    """Remembers that a stop was asked for; the world agrees on it at the next step boundary."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def requested(self) -> bool:
        return self._signalled or self._file.exists()

    def clear(self) -> None:
        """Remove the file, so that the next start does not stop at once."""
        self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
