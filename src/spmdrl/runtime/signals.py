"""Signals that ask a run to stop, noted from the first moment on. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import weakref
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to stop: schedulers send the first, and the second as a warning."""

_NOTED = (*STOPPING, signal.SIGXCPU)
"""The system sends the last when the CPU time of the process (`ulimit -t`) is nearly over."""

CPU_S = 60
"""Of that time, what is left for a save (a tenth of a smaller limit)."""


class Signals:
    """Notes the stopping signals, to be read by a thread at any later time.

    The C handler of Python writes a signal's number to a socket at once, also while the main thread
    is in a collective or imports torch; nothing is lost between here and the first `wait`. To be
    made by the main thread.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        for number in _NOTED:
            signal.signal(number, _note)
        _leave_cpu_time()
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        own = weakref.ref(self)
        # a forked child would write its own signals to our socket
        os.register_at_fork(after_in_child=lambda: _forget(own()))

    def wait(self, seconds: float) -> list[int]:
        """The signals noted since the last call; waits for one for `seconds` at most."""
        ready = select.poll()  # `select.select` knows no descriptor from 1024 on
        ready.register(self._reader, select.POLLIN)
        if not ready.poll(1000 * seconds):
            return []
        with contextlib.suppress(BlockingIOError):
            return [number for number in self._reader.recv(4096) if number in _NOTED]
        return []

    def ignore(self) -> None:
        """From now on they do nothing, also while the interpreter shuts down.

        CPython gives Python's handlers up at exit: a late signal would then kill a rank that is
        done (with -10 for SIGUSR1).
        """
        for number in _NOTED:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Note no more. Handlers give way to the defaults; signals that are ignored stay so."""
        current = signal.set_wakeup_fd(-1)
        if current != self._writer.fileno():  # a later object has taken over
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
        else:
            for number in _NOTED:
                if signal.getsignal(number) is _note:
                    signal.signal(number, signal.SIG_DFL)
        self._reader.close()
        self._writer.close()


def _leave_cpu_time() -> None:
    """Where CPU time has an end, the signal comes some time before SIGKILL does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY and soft == hard:
        left = min(CPU_S, hard // 10)
        resource.setrlimit(resource.RLIMIT_CPU, (hard - left, hard))


def _note(number: int, frame: FrameType | None) -> None:
    """The number is in the socket already: without a handler the signal would do its default."""


def _forget(signals: Signals | None) -> None:
    if signals is not None and signals._writer.fileno() >= 0:
        signals.close()
