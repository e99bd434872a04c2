"""Signals that ask a run to stop or end the process at once, noted from the program's start on.

Only this module gives signals a meaning. It imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import signal
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from spmdrl.supervision.processes import descendants

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""Signals, besides SIGINT, that ask a run to stop; schedulers send the second as a warning."""

_NOTED = (*STOPPING, signal.SIGXCPU)
"""The system sends the last when the CPU time of the process (`ulimit -t`) is nearly used up."""

CPU_S = 60
"""Seconds of CPU time reserved for a save (at most a tenth of the limit)."""

HELD = (signal.SIGINT, signal.SIGTERM)

SAME_S = 1.0
"""Seconds within which deliveries of SIGINT are one request: Slurm signals a launcher and its
ranks, and the launcher passes it on."""

EXIT_INTERRUPTED = 130
"""Exit code that shells use for a process that SIGINT ended."""

_LEAVE_FIRST_S, _LEAVE_OTHERS_S = 0.1, 0.3
"""Seconds that ranks wait before they end at once, so that all ranks have received the signal and
none reports the loss of a peer."""

_SO_TIMESTAMPNS = 35
"""Linux's number of the socket option, which `socket` does not name."""

DEBUGGER_FILE = "SPMDRL_DEBUGGER_FILE"
"""Variable with the path of a file by which a rank claims SIGINT for its debugger."""


def hold() -> None:
    """Hold SIGINT and SIGTERM until `release`, so that none is lost or ends the program while it
    imports the code that answers them. Processes started meanwhile inherit this.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release() -> None:
    """Deliver the signals held since `hold`, and hold no more."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


@dataclass(kw_only=True)
class Interrupts:
    """Meaning of SIGINT, and of SIGTERM after it, by the times at which they were sent.

    Args:
        saves: the first SIGINT is a request; otherwise it ends the process.
        under_agent: torchrun's agent, which sends SIGTERM at a second SIGINT, runs the process.
    """

    saves: bool
    under_agent: bool
    first: float | None = None
    """Time at which the first SIGINT was sent, in seconds."""

    def meaning(self, number: int, sent: float) -> Literal["ask", "same", "end"]:
        """Whether a signal asks for a stop, repeats the first SIGINT, or ends the process."""
        if number == signal.SIGINT and self.first is None:
            self.first = sent
            return "ask" if self.saves else "end"
        later = self.first is not None and sent - self.first > SAME_S
        if number == signal.SIGINT:
            return "end" if later else "same"
        return "end" if number == signal.SIGTERM and later and self.under_agent else "ask"


class Signals:
    """Recorder of the stopping signals, which another thread can read later; ends the process when
    SIGINT means that.

    Python's C handler writes a signal's number to a socket at once, even while the main thread is
    in a collective or imports torch; the socket keeps the time, and a separate thread reads it.
    Nothing is lost between here and the first `wait`. Only the main thread may make it.

    Under a debugger (pdb, or one that traces) SIGINT is for the debugger: it raises
    KeyboardInterrupt as usual.

    Args:
        command: name of the command, for messages.
        saves: stopping signals, including the first SIGINT, are requests. Otherwise they keep
            their defaults, except SIGINT, which ends the process.
    """

    def __init__(self, command: str = "train", *, saves: bool = True) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        # kernel times: a thread that waits for the interpreter's lock would measure wrong gaps
        self._reader.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._writer.setblocking(False)
        self._command, self._saves = command, saves
        self._interrupts = Interrupts(saves=saves, under_agent="TORCHELASTIC_RUN_ID" in os.environ)
        self._requests: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.noted: int | None = None
        """The first request."""
        self._is_settled = False
        self._own = _NOTED if saves else ()
        for number in self._own:
            signal.signal(number, _note)
        before = signal.getsignal(signal.SIGINT)
        self._before = signal.default_int_handler if before is _note else before
        if not is_debugged():
            signal.signal(signal.SIGINT, _note)
        if saves:
            _leave_cpu_time()
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        own = weakref.ref(self)
        # a forked child would write its own signals to our socket
        os.register_at_fork(after_in_child=lambda: _forget(own()))
        self._thread = threading.Thread(target=self._listen, name="spmdrl-signals", daemon=True)
        self._thread.start()
        release()

    def wait(self, seconds: float) -> list[int]:
        """Requests noted since the last call; waits at most `seconds` for the first."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._requests.get(timeout=seconds))
            while True:
                found.append(self._requests.get_nowait())
        return found

    def settle(self) -> None:
        """End requests, because the run ends. A later second SIGINT still ends the process."""
        self._is_settled = True

    def ignore(self) -> None:
        """Ignore the signals from now on, also while the interpreter shuts down.

        CPython drops Python's handlers at exit: a late signal would then kill a finished rank (exit
        code -10 for SIGUSR1).
        """
        for number in (*self._own, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Stop noting signals. Their handlers are reset; ignored signals stay ignored."""
        if self._writer.fileno() < 0:
            return
        current = signal.set_wakeup_fd(-1)
        if current != self._writer.fileno():  # a later object has taken over
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        else:
            for number in self._own:
                if signal.getsignal(number) is _note:
                    signal.signal(number, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is _note:
                signal.signal(signal.SIGINT, self._before)
        if self._thread.is_alive():  # not in a forked child
            self._writer.send(b"\0")
            self._thread.join()
        self._reader.close()
        self._writer.close()

    def _listen(self) -> None:
        while True:
            message, extra, _, _ = self._reader.recvmsg(1, 64)
            if message == b"\0":
                return
            self._take(message[0], _sent(extra))

    def _take(self, number: int, sent: float) -> None:
        if number not in (*self._own, signal.SIGINT):
            return
        if number == signal.SIGINT and (signal.getsignal(number) is not _note or is_debugged()):
            _leave_debugger_file()
            return
        meaning = self._interrupts.meaning(number, sent)
        if meaning == "end":
            again = " again: ends at once, without saving" if self._saves else ""
            end_at_once(f"spmdrl {self._command}: interrupted{again}")
        if meaning == "same" or self._is_settled:
            return
        if number == signal.SIGINT and is_first_rank():
            say(
                f"spmdrl {self._command}: SIGINT: stops where it can resume exactly, and saves; "
                "a second one ends at once, without saving"
            )
        self.noted = number if self.noted is None else self.noted
        self._requests.put(number)


def is_first_rank() -> bool:
    """Whether this is rank 0, by the launcher's variables: there may be no world yet."""
    name = "SLURM_PROCID" if os.environ.get("SPMDRL_LAUNCH") == "srun" else "RANK"
    return os.environ.get(name, "0") == "0"


def say(line: str) -> None:
    """Write a line to stderr, whatever locks other threads hold on the stream."""
    with contextlib.suppress(OSError):
        # a terminal shows "^C" before it
        os.write(2, f"{os.linesep if os.isatty(2) else ''}{line}\n".encode())


def end_at_once(line: str) -> NoReturn:
    """End the process and the processes it has started in its group (data loaders, say; a reward
    server ends by itself). Rank 0 prints `line`; the others print nothing more.
    """
    if is_first_rank():
        say(line)
        time.sleep(_LEAVE_FIRST_S)
    else:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        time.sleep(_LEAVE_OTHERS_S)
    for process in descendants(os.getpid()):
        if process.group == os.getpgrp():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    os._exit(EXIT_INTERRUPTED)


def is_debugged() -> bool:
    """Whether the main thread is in a debugger, or is traced by one. Any thread may ask."""
    identity = threading.main_thread().ident
    frame = None if identity is None else sys._current_frames().get(identity)
    while frame is not None:
        if frame.f_trace is not None or frame.f_globals.get("__name__") in ("bdb", "pdb"):
            return True
        frame = frame.f_back
    return False


def _leave_debugger_file() -> None:
    where = os.environ.get(DEBUGGER_FILE)
    if where is not None:
        with contextlib.suppress(OSError):
            Path(where).touch()


def _sent(extra: Sequence[tuple[int, int, bytes]]) -> float:
    """Time at which a signal was delivered, or of reading it if the kernel lacks it (gVisor)."""
    for level, kind, value in extra:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("qq", value)
            return float(seconds + nanoseconds * 1e-9)
    return time.time()


def _leave_cpu_time() -> None:
    """If CPU time is limited, let SIGXCPU come some time before SIGKILL."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY and soft == hard:
        left = min(CPU_S, hard // 10)
        resource.setrlimit(resource.RLIMIT_CPU, (hard - left, hard))


def _note(number: int, frame: FrameType | None) -> Any:
    """Do nothing: the number is in the socket already, and a handler prevents the default."""
    if number == signal.SIGINT and is_debugged():
        signal.default_int_handler(number, frame)


def _forget(signals: Signals | None) -> None:
    if signals is not None:
        signals.close()
