"""`Forwarder`: the thread of `spmdrl launch` that passes SIGINT and SIGTERM on to the ranks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path

from spmdrl.supervision.processes import processes
from spmdrl.supervision.signals import (
    DEBUGGER_FILE,
    EXIT_INTERRUPTED,
    HELD,
    Interrupts,
    say,
)

COMMANDS = ("train", "eval", "generate", "doctor")
"""Commands that ranks can run."""

TICK_S = 0.05

KILL_S = 1.0
"""Seconds that ranks have to end by themselves when they must end at once."""


class Forwarder:
    """Answers the held signals (`supervision.signals.hold`) until the process ends.

    Before any rank is started a signal ends the process: there is nothing to save.

    Args:
        command: the command of the ranks; `train` saves at the first SIGINT.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._interrupts = self._new_interrupts()
        self._is_ending = False
        self._begins = threading.Lock()
        self._has_ranks = False
        self._directory = self._debugger_file = Path()
        self._patience: float | None = None
        self._request: int | None = None
        """Signal that all ranks get, also those that start later."""
        self._told: set[int] = set()
        self._deadline: float | None = None
        threading.Thread(target=self._run, name="spmdrl-forwarder", daemon=True).start()

    def start_ranks(self, command: str, patience: float | None, directory: Path) -> None:
        """Note that ranks may exist from now on.

        Args:
            command: the command that they run.
            patience: seconds that they have after a request; None: no limit.
            directory: temporary directory in which they leave files for the launcher.
        """
        with self._begins:
            self._has_ranks, self._command = True, command
            self._interrupts = self._new_interrupts()
            self._patience, self._directory = patience, directory
            self._debugger_file = directory / "debugger"
            os.environ[DEBUGGER_FILE] = str(self._debugger_file)

    def let_end(self) -> None:
        """Wait, after the ranks have ended, if the thread is about to end the process."""
        while self._is_ending:
            time.sleep(TICK_S)

    def _new_interrupts(self) -> Interrupts:
        return Interrupts(saves=self._command == "train", under_agent=True)

    def _run(self) -> None:
        while True:
            found = signal.sigtimedwait(HELD, TICK_S)
            if found is not None:
                self._take(found.si_signo)
            if self._request is not None:
                self._tell(self._request)
            if self._deadline is not None and time.monotonic() > self._deadline:
                say(f"spmdrl launch: ranks have not ended within {self._patience:g} s: killed")
                self._end()

    def _take(self, number: int) -> None:
        meaning = self._interrupts.meaning(number, time.time())
        with self._begins:
            if not self._has_ranks:
                self._leave_early(number)
        if meaning == "end":
            self._end_at_once()
        elif meaning == "ask":
            if not ranks():
                say(f"spmdrl launch: {signal.Signals(number).name}: no rank has started yet; waits")
            self._told.clear()
            self._request = number
            if self._patience is not None and self._deadline is None:
                self._deadline = time.monotonic() + self._patience

    def _leave_early(self, number: int) -> None:
        if self._command == "train":
            say("spmdrl launch: stopped before any rank was started: nothing was to save")
        else:
            say(f"spmdrl {self._command}: interrupted")
        os._exit(0 if self._command == "train" and number == signal.SIGINT else 128 + number)

    def _tell(self, number: int) -> None:
        """Signal each rank once; a rank that is still starting answers it when it can."""
        for pid in ranks():
            if pid not in self._told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                self._told.add(pid)

    def _end_at_once(self) -> None:
        """Send SIGINT once more, by which ranks end by themselves, and kill those that do not."""
        self._is_ending = True
        if not ranks():
            say(f"spmdrl {self._command}: interrupted: no rank had started")
        self._told.clear()
        self._tell(signal.SIGINT)
        deadline = time.monotonic() + KILL_S
        while ranks() and time.monotonic() < deadline:
            time.sleep(TICK_S)
        if ranks():
            if self._debugger_file.exists():
                self._go_on()
                return
            say(f"spmdrl {self._command}: interrupted: ranks that did not end were killed")
        self._end()

    def _go_on(self) -> None:
        """Continue, because SIGINT was for a rank's debugger."""
        self._debugger_file.unlink()
        self._interrupts = self._new_interrupts()
        self._request = self._deadline = None
        self._is_ending = False

    def _end(self) -> None:
        """Kill the ranks and exit at once: after `import torch` a regular exit takes long."""
        self._is_ending = True
        for pid in ranks():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(self._directory, ignore_errors=True)
        os._exit(EXIT_INTERRUPTED)


def ranks() -> list[int]:
    """Process ids of running ranks: this process's children that lead a session."""
    own = os.getpid()
    return [p.pid for p in processes() if p.parent == own and p.session == p.pid]
