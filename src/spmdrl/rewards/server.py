"""The rank's handle on its fork server. Imports neither torch nor anything else that is heavy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import TracebackType

from spmdrl.rewards.process import OUTLIVED

PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR"),
    *("TERM", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_*"),
    *("OMP_*", "MKL_*", "OPENBLAS_*", "MALLOC_*", "HF_HOME", "HF_*_OFFLINE", "HF_*_CACHE"),
    *("TRANSFORMERS_*", "TOKENIZERS_PARALLELISM", "SSL_CERT_*", "*_proxy", "*_PROXY"),
    *("CUDA_*", "NVIDIA_*"),
)
"""Variables that reward functions see; `*` stands for any text. Tokens are not among them."""


def passed_variables(names: Sequence[str]) -> dict[str, str]:
    """This process's environment variables whose names are among `names`."""
    return {
        name: value
        for name, value in os.environ.items()
        if any(fnmatchcase(name, wanted) for wanted in names)
    }


def start_reward_server() -> RewardServer:
    """Start the fork server: the first thing a program does, before `import torch`.

    Workers are forked from the server, never from the rank, which by then may hold CUDA contexts,
    registered memory and threads that do not survive a fork. The server is a fresh interpreter
    (a new program, not a fork of this one) in a session of its own, so that a Ctrl-C or a signal to
    the rank's process group leaves it alone; it ends when the rank does.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from spmdrl.rewards.process import serve; serve({theirs.fileno()})"
    )
    environment = {
        # One thread per worker, and the same set order in every worker of every rank.
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
    """The server is gone, and its workers with it."""


class RewardServer:
    """Forks and ends reward workers. One rank has one; several pools may share it."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._num_requests = 0
        self._is_closed = False

    def preload(self, modules: Sequence[str]) -> None:
        """Import modules in the server, so that workers forked later have them."""
        self._request({"do": "preload", "modules": list(modules)}, [])

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: its process id and the socket that it listens on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._request({"do": "fork"}, [theirs.fileno()])
        return self._answer(), ours

    def kill(self, pid: int) -> int:
        """End a worker with all that it started; its exit code, negative for a signal."""
        self._request({"do": "kill", "pid": pid}, [])
        return self._answer()

    def ended(self) -> str | None:
        """What has become of the server where it ended by itself; to be asked by any thread."""
        code = self._process.poll()
        if code is None or self._is_closed:
            return None
        return f"the reward server (process {self._process.pid}) ended with exit code {code}"

    def check(self) -> None:
        """Raises:
        ServerEnded: it ended by itself.
        """
        if self.ended() is not None:
            raise self._ended()

    def close(self) -> None:
        """End the server and all its workers."""
        self._is_closed = True
        self._control.close()
        self._process.wait()

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, request: dict[str, object], descriptors: list[int]) -> None:
        self._num_requests += 1
        message = json.dumps({**request, "number": self._num_requests}).encode()
        try:
            socket.send_fds(self._control, [message], descriptors)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._ended() from error

    def _answer(self) -> int:
        """The answer to the last request; those to interrupted requests before it are passed."""
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
