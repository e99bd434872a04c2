"""The rank's handle on its fork server. Imports nothing heavy, so not torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase

from spmdrl.rewards.process import OUTLIVED

PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR"),
    *("TERM", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_*"),
    *("OMP_*", "MKL_*", "OPENBLAS_*", "MALLOC_*", "HF_HOME", "HF_*_OFFLINE", "HF_*_CACHE"),
    *("TRANSFORMERS_*", "TOKENIZERS_PARALLELISM", "SSL_CERT_*", "*_proxy", "*_PROXY"),
    *("CUDA_*", "NVIDIA_*"),
)
"""Environment variables that reward functions see; `*` matches any text. No secrets pass."""


def passed_variables(names: Sequence[str]) -> dict[str, str]:
    """This process's environment variables whose names match one of `names`."""
    return {
        name: value
        for name, value in os.environ.items()
        if any(fnmatchcase(name, wanted) for wanted in names)
    }


def start_reward_server() -> RewardServer:
    """Start the fork server; a program does this first, before `import torch`.

    Workers are forked from the server, never from the rank, which by then may hold CUDA contexts,
    registered memory and threads that do not survive a fork. The server is a fresh interpreter
    (not a fork of this one) in its own session, so that Ctrl-C or a signal to the rank's process
    group does not reach it; it ends when the rank does.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from spmdrl.rewards.process import serve; serve({theirs.fileno()})"
    )
    environment = {
        # one thread per worker, and the same order of sets in all workers
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        **passed_variables(PASSED),
    }
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OUTLIVED)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return RewardServer(process, ours)


class ServerEnded(RuntimeError):
    """The server has ended, and its workers with it."""


class RewardServer(AbstractContextManager["RewardServer"]):
    """Handle that forks and ends reward workers. A rank has one; several pools may share it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._num_requests = 0
        self._is_closed = False

    def preload(self, modules: Sequence[str]) -> None:
        """Import modules in the server, so that workers forked later have them."""
        self._request({"do": "preload", "modules": list(modules)}, [])

    def fork(self) -> tuple[int, socket.socket]:
        """Fork a worker; returns its process id and the rank's end of the socket to it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._request({"do": "fork"}, [theirs.fileno()])
        return self._answer(), ours

    def kill(self, pid: int) -> int:
        """End a worker and all it started; returns its exit code, negative for a signal."""
        self._request({"do": "kill", "pid": pid}, [])
        return self._answer()

    def ended(self) -> str | None:
        """Message about a server that ended by itself, or None. Any thread may ask."""
        code = self._process.poll()
        if code is None or self._is_closed:
            return None
        return f"the reward server (process {self._process.pid}) ended with exit code {code}"

    def check(self) -> None:
        """Check that the server runs. ServerEnded: it ended by itself."""
        if self.ended() is not None:
            raise self._ended()

    def close(self) -> None:
        """End the server and all its workers."""
        self._is_closed = True
        self._control.close()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, request: dict[str, object], descriptors: list[int]) -> None:
        self._num_requests += 1
        message = json.dumps({**request, "number": self._num_requests}).encode()
        try:
            socket.send_fds(self._control, [message], descriptors)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._ended() from error

    def _answer(self) -> int:
        """Read the answer to the last request; skip those to earlier, interrupted requests."""
        while True:
            try:
                message = self._control.recv(4096)
            except ConnectionResetError:
                message = b""
            if not message:
                raise self._ended()
            number, value = json.loads(message)
            if number == self._num_requests:
                return int(value)

    def _ended(self) -> ServerEnded:
        code = self._process.wait()  # its end of the socket is closed: it is ending
        return ServerEnded(
            f"the reward server (process {self._process.pid}) ended with exit code {code}: was it "
            "killed, for memory perhaps?"
        )
