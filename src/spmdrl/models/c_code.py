"""C kernels for the CPU, compiled on the machine that runs them, for its processor.

A wheel would carry code for the oldest processor; torch's compiler takes half a minute for a
decoder layer. A small file of C takes cc a second, once: the library is kept in the user's cache
directory under a name that has everything in it that made it. Where there is no compiler, torch's
own operations do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
_HEADERS = Path(__file__).parent
_TIMEOUT_S = 60


@functools.cache
def load(source: Path, **constants: int) -> ctypes.CDLL | None:
    """The functions of a C file, compiled with `constants` defined; None where that cannot be done
    here (said once in the log)."""
    compiler = _compiler()
    if compiler is None:
        log.info("no C compiler here (%s): torch's own operations serve", ", ".join(COMPILERS))
        return None
    flags = (*FLAGS, f"-I{_HEADERS}", *(f"-D{k}={v}" for k, v in sorted(constants.items())))
    try:
        name = f"{source.stem}-{_fingerprint(source, compiler, constants)}.so"
        with _directory() as directory:
            if not (directory / name).exists():
                _compile(compiler, flags, source, directory / name)
            # torch has loaded its OpenMP under the name that this asks for: one pool of threads
            return ctypes.CDLL(str(directory / name))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning("%s: %s failed, torch's own operations serve: %s", source.name, compiler, said)
        return None


@contextmanager
def _directory() -> Iterator[Path]:
    """The cache's, or one of this process that is gone after: a loaded library needs no file."""
    try:
        path = cache_directory()
    except OSError:
        with tempfile.TemporaryDirectory(prefix="spmdrl-") as made:
            yield Path(made)
    else:
        yield path


def cache_directory() -> Path:
    """Where compiled kernels are kept: the user's alone, since what lies there is run.

    Raises:
        OSError: it cannot be made, or somebody else can write there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "spmdrl" / "kernels"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is not this user's alone")
    return path


def _compile(compiler: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Atomic, since ranks that share a home directory start together."""
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        out = Path(made) / target.name
        subprocess.run(
            [compiler, *flags, str(source), "-o", str(out), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        out.replace(target)


def _fingerprint(source: Path, compiler: str, constants: dict[str, int]) -> str:
    """Of what the library is made of: text, compiler, processor."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S
    ).stdout
    texts = [p.read_text(encoding="utf-8") for p in (source, *sorted(_HEADERS.glob("*.h")))]
    parts = (*texts, version, repr(FLAGS), repr(sorted(constants.items())), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compiler() -> str | None:
    given = os.environ.get("CC", "").split()
    for name in (*given[:1], *COMPILERS):
        if found := shutil.which(name):
            return found
    return None
