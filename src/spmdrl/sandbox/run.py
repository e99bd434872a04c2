"""`Confined`: a Python program in namespaces of its own.

It has no network, no files but the system's and Python's (read-only) and an empty /tmp, no way to
start processes, and limits of memory, time and disk. Programs are those of this package that run
other people's code (`sandbox.answering`, `sandbox.testing`): the process that runs such code never
judges it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from spmdrl.sandbox.inside import FAILED
from spmdrl.sandbox.processes import descendants

Isolation = Literal["namespaces", "none"]

_PACKAGE = Path(__file__).resolve().parents[2]
MAX_OUTPUT = 1 << 20
"""Most bytes of a program's output that are read."""

_ROUNDS = 100
"""Times that the processes below a program are looked for when it is killed."""


class SandboxError(RuntimeError):
    """Programs cannot be confined here; the text has the kernel's reason."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one program.

    Args:
        memory_mb: MiB of address space, Python's own 30 MiB and more included.
        cpu_s: CPU seconds, whole.
        disk_mb: MiB of its /tmp, which lie in memory.
    """

    memory_mb: int = 1024
    cpu_s: int = 10
    disk_mb: int = 64


class Confined(AbstractContextManager["Confined"]):
    """A running program, with all that it has started, which end with the `with` block.

    Args:
        program: `module:function` of `spmdrl.sandbox`.
        arguments: its arguments, strings.
        given: text of its standard input.
        descriptors: open files that it inherits, under the same numbers.
        isolation: `none` runs it with limits only, in an empty directory.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str] = (),
        *,
        limits: Limits,
        given: str = "",
        isolation: Isolation = "namespaces",
        descriptors: Sequence[int] = (),
    ) -> None:
        self._root = tempfile.mkdtemp(prefix="spmdrl-sandbox-")
        settings = {
            "parent": os.getpid(),
            "isolated": isolation == "namespaces",
            "root": self._root,
            "paths": _readable_paths(),
            "program": program,
            "arguments": list(arguments),
            **asdict(limits),
        }
        code = (
            f"import sys; sys.path.insert(0, {str(_PACKAGE)!r}); "
            "from spmdrl.sandbox.inside import main; main()"
        )
        # files in memory: a program that does not read, or does not end, keeps nobody waiting
        self._output, self._errors = memory_file(), memory_file()
        stdin = memory_file(given)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", code, json.dumps(settings)],
            stdin=stdin,
            stdout=self._output,
            stderr=self._errors,
            pass_fds=tuple(descriptors),
            env=_environment(),
            start_new_session=True,
            cwd="/",
        )
        os.close(stdin)

    def output(self) -> str:
        """Return what it has printed so far, or the first `MAX_OUTPUT` bytes of it."""
        return _read(self._output)

    def errors(self) -> str:
        """Return what it has written to standard error."""
        return _read(self._errors)

    def wait(self, deadline: float) -> int | None:
        """Return the exit code, or None if the program still runs at `deadline` (monotonic time).

        Raises:
            SandboxError: it could not be confined.
        """
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        if code == FAILED:
            lines = self.errors().splitlines()
            raise SandboxError(lines[-1] if lines else "no reason was given")
        return code

    def close(self) -> None:
        """Kill the program and all that it has started, and remove its directory."""
        # the first process last: it adopts those whose parents end, and ends when the program does,
        # unless the program has stopped it
        for _ in range(_ROUNDS):
            found = descendants(self._process.pid)
            if self._process.poll() is not None or not found:
                break
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        self._process.kill()
        self._process.wait()
        for descriptor in (self._output, self._errors):
            os.close(descriptor)
        shutil.rmtree(self._root, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self.close()


def memory_file(text: str = "") -> int:
    """Return the descriptor of a file in memory with a text, to be read from its beginning."""
    descriptor = os.memfd_create("spmdrl-sandbox")
    left = memoryview(text.encode("utf-8", "replace"))
    while left:
        left = left[os.write(descriptor, left) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _read(descriptor: int) -> str:
    return os.pread(descriptor, MAX_OUTPUT, 0).decode("utf-8", "replace")


@cache
def unusable() -> str | None:
    """Reason why programs cannot be confined on this host, or None if they can: one is tried."""
    try:
        with Confined("answering:nothing", limits=Limits()) as program:
            code = program.wait(time.monotonic() + 20)
            said = program.errors().strip().splitlines()
    except (SandboxError, OSError) as error:
        return str(error)
    if code == 0:
        return None
    return said[-1] if said else f"a program that does nothing ended with exit code {code}"


def _environment() -> Mapping[str, str]:
    names = ("LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
    own = {name: os.environ[name] for name in names if name in os.environ}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", **threads, **own}


@cache
def _readable_paths() -> tuple[str, ...]:
    """Directories of Python, its packages and this one, which hold no user's data."""
    named = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    found = [Path(path) for path in (*named, os.path.dirname(os.path.realpath(sys.executable)))]
    inside = [path / "lib" if len(path.parts) <= 2 else path for path in found]
    package = _PACKAGE / "spmdrl" / "sandbox"
    return tuple(dict.fromkeys(str(path) for path in (*inside, package) if path.is_dir()))
