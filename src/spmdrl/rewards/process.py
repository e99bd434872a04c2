"""The fork server's process and the workers that it forks: all code that runs outside the rank.

The server has no threads and no CUDA, imports the libraries of built-in rewards once, and forks a
worker in milliseconds. This module imports only the standard library and this package's own light
modules. Messages to the server are JSON datagrams on one socket; when the rank closes that socket
or dies, every worker ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import pickle
import reprlib
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from spmdrl.config.user_objects import own_frames, own_story
from spmdrl.rewards.arguments import Caller
from spmdrl.rewards.functions import RewardFunction, RewardSpec, load
from spmdrl.sandbox.processes import children_by_parent, descendants

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""Largest reward: rewards are float32 columns, in which a larger one would be infinite."""

OUTLIVED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the server and its workers ignore."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Work(Protocol):
    """Settings that a worker gets when it starts, pickled, and the work that it then does.

    A class of another room has its module imported in the worker, so it imports nothing heavy.
    """

    @property
    def output(self) -> str | None:
        """File for what is printed; None: it is dropped."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables in addition to those of the server."""

    def serve(self, channel: socket.socket) -> None:
        """Answer messages until the channel closes."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """The `Work` of a reward worker.

    Args:
        specs: the components that it scores.
        columns: columns of the rows that it scores; None: unknown.
        cpu_s: CPU seconds that one call may take, in case the rank's wall-clock limit fails.
        memory_mb: MiB that calls may take beyond what the loaded worker has; None: no limit.
        output: file for the output that reward functions print; None: it is dropped.
        environment: variables in addition to those of the server.
    """

    specs: tuple[RewardSpec, ...]
    columns: tuple[str, ...] | None
    cpu_s: float
    memory_mb: int | None
    output: str | None
    environment: Mapping[str, str]

    def serve(self, channel: socket.socket) -> None:
        """Load the functions, report it, then answer calls until the channel closes."""
        try:
            functions = [load(spec, self.columns) for spec in self.specs]
        except ValueError as error:
            send(channel, json.dumps({"error": str(error)}).encode())
            return
        if self.memory_mb is not None:
            limit_memory(self.memory_mb)
        callers = [f if isinstance(f, Caller) else None for f in functions]
        known = [None if caller is None else caller.told() for caller in callers]
        send(channel, json.dumps({"callers": known}).encode())
        while (message := receive(channel)) is not None:
            component, arguments = pickle.loads(message)
            limit_cpu(self.cpu_s)
            reply = call(functions[component], arguments)
            send(channel, json.dumps(reply).encode())


def serve(control_fd: int) -> None:
    """Run the fork server: answer requests until the rank's end of the socket closes."""
    control = socket.socket(fileno=control_fd)
    _outlive_signals()
    _adopt_orphans()
    children: set[int] = set()
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 65536, 1)
        except ConnectionResetError:  # the rank was killed before it read an answer
            break
        if not message:
            break
        request = json.loads(message)
        if request["do"] == "preload":
            _preload(request["modules"])
        elif request["do"] == "fork":
            pid = _fork_worker(control, descriptors[0])
            children.add(pid)
            _answer(control, request["number"], pid)
        else:
            children.remove(request["pid"])
            _answer(control, request["number"], _kill(request["pid"], children))
    while children:
        _kill(children.pop(), children)


def _answer(control: socket.socket, number: int, value: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next read says so
        control.send(json.dumps([number, value]).encode())


def _outlive_signals() -> None:
    """Ignore signals to the whole job (Ctrl-C, Slurm's warning), which the rank answers.

    This installs handlers instead of SIG_IGN, so that programs that a reward function starts get
    the defaults back. The server is started with these signals held, so that none ends it earlier.
    """
    for number in OUTLIVED:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTLIVED)


def _preload(modules: Sequence[str]) -> None:
    for name in modules:
        # A module that is not installed is reported by the worker that needs it.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # keeps collections in workers from touching, and so copying, shared pages


def _fork_worker(control: socket.socket, descriptor: int) -> int:
    pid = os.fork()
    if pid == 0:
        _run_worker(control, descriptor)
    os.close(descriptor)
    # Both sides set the group, so that a kill of the group can follow at once.
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(pid, pid)
    return pid


def _adopt_orphans() -> None:
    """Let a process that has left its worker (setsid, a double fork) become the server's child.

    If the kernel does not support this, the process stays independent.
    """
    _ask_kernel(PR_SET_CHILD_SUBREAPER, 1)


def _ask_kernel(option: int, value: int) -> None:
    """Call prctl(2), if it exists."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _kill(pid: int, others: Set[int]) -> int:
    """End a worker and the processes it started; returns its exit code, negative for a signal.

    Args:
        others: the workers that continue. Other children of the server have outlived the process
            that started them, and end too.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for found in descendants(pid):  # those in other groups
        with contextlib.suppress(ProcessLookupError):
            os.kill(found, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    while strays := [
        child for child in children_by_parent().get(os.getpid(), ()) if child not in others
    ]:
        for stray in strays:
            os.kill(stray, signal.SIGKILL)  # ours: at most a zombie
            os.waitpid(stray, 0)
    return code


def _run_worker(control: socket.socket, descriptor: int) -> NoReturn:
    try:
        os.setpgid(0, 0)
        # a server that is killed cannot end its workers: they end by themselves
        _ask_kernel(PR_SET_PDEATHSIG, signal.SIGKILL)
        control.close()
        # open until the process ends: a rank that sees it close kills the worker, and what it then
        # tells is the worker's own exit code
        channel = socket.socket(fileno=descriptor)
        work(channel)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # never back into the server's loop


def work(channel: socket.socket) -> None:
    """Run a worker: receive its settings, and do the work that they name."""
    message = receive(channel)
    if message is None:
        return
    settings: Work = pickle.loads(message)
    _redirect_output(settings.output)
    os.environ.update(settings.environment)
    settings.serve(channel)


def call(function: RewardFunction, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Call a function: `{"values": {"score": …}, "ignored": […]}`, or `{"reason": …, "message": …}`
    if it failed. `ignored` are the keys of a dict whose values are not numbers.
    """
    try:
        value = function(*arguments)
    except MemoryError:
        return {"reason": "memory", "message": "MemoryError: the call went past the memory limit"}
    # Whatever a reward function raises (SystemExit too) is a failed call, not a failed worker.
    except BaseException as error:
        is_refused = isinstance(function, Caller) and not own_frames(error)
        reason = "signature" if is_refused and isinstance(error, TypeError) else "exception"
        return {"reason": reason, "message": own_story(error)}
    try:
        values, ignored = _named(value)
    # `float` calls the value's own code, which may raise anything.
    except Exception as error:
        returned = f"it returned a {type(value).__name__}: {reprlib.repr(value)}"
        return {"reason": "returned", "message": f"{returned} ({error})"}
    # `not <=` because NaN compares as false
    bad = {name: value for name, value in values.items() if not abs(value) <= FLOAT32_MAX}
    if bad:
        return {"reason": "nan", "message": f"the reward function returned {bad}"}
    return {"values": values, "ignored": ignored}


def _named(value: Any) -> tuple[dict[str, float], list[str]]:
    """The named numbers that a function has returned, and the keys whose values are not numbers."""
    if not isinstance(value, Mapping):
        return {"score": float(value)}, []
    if "score" not in value:
        raise ValueError(f"a reward function's dict must hold 'score'; it has {list(value)}")
    values: dict[str, float] = {}
    ignored: list[str] = []
    for name, entry in value.items():
        try:
            # a text is not a number, even if it looks like one
            values[str(name)] = _number(entry) if name != "score" else float(entry)
        except (TypeError, ValueError) as error:
            if name == "score":
                raise ValueError(f"'score' is no number: {entry!r}") from error
            ignored.append(str(name))
    return values, ignored


def _number(entry: Any) -> float:
    if isinstance(entry, str | bytes):
        raise TypeError(entry)
    return float(entry)


def _redirect_output(output: str | None) -> None:
    """Redirect the standard streams, away from the rank's console."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    sink = null
    if output is not None:
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    # line by line: a kill flushes nothing; in UTF-8: what a function prints fails in no locale
    sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", errors="replace", closefd=False)


def limit_memory(extra_mb: int) -> None:
    """Limit the address space to what this process has now and `extra_mb` MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + extra_mb * 2**20)


def limit_cpu(seconds: float) -> None:
    """Limit the CPU time of the next call: RLIMIT_CPU counts over the whole life of a process."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _limit(resource.RLIMIT_CPU, math.ceil(used + seconds) + 1)


def _limit(kind: int, limit: int) -> None:
    """Set a soft limit, at most the hard one, which stays (only root may raise it)."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(kind, (limit, hard))


def send(channel: socket.socket, payload: bytes) -> None:
    """Send one length-prefixed message."""
    channel.sendall(struct.pack("!I", len(payload)) + payload)


def receive(channel: socket.socket) -> bytes | None:
    """Receive one length-prefixed message; None if the other end is gone."""
    header = _read(channel, 4)
    return None if header is None else _read(channel, struct.unpack("!I", header)[0])


def _read(channel: socket.socket, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        try:
            part = channel.recv(min(count, 1 << 20))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
