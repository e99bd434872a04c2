"""C kernels for the CPU, compiled on the machine that runs them, for its processor.

A wheel would carry code for the oldest processor. A small file of C takes the compiler a second,
once: the library is kept in the user's cache directory under a name that has everything in it that
made it. Where there is no compiler, torch's own operations do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

COMPILERS = ("gcc", "clang", "cc")
"""In this order: a site's module brings a new gcc, and leaves the system's old cc."""
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-fast-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-std=gnu11",
)
_HEADERS = Path(__file__).parent
_TIMEOUT_S = 60


@functools.cache
def load(source: Path, **constants: int) -> ctypes.CDLL | None:
    """The functions of a C file, compiled with `constants` defined; None where that cannot be done
    here, which the log says.

    The compiler is `$CC` or the first of `COMPILERS` that compiles it. Its OpenMP is gcc's, which
    torch has loaded under the same name, so that there is one pool of threads; clang has another.
    """
    failures = []
    for command in _compilers():
        try:
            return _load(command, source, constants)
        except subprocess.CalledProcessError as error:
            failures.append(f"{' '.join(command)}: {error.stderr or error}")
        except (OSError, subprocess.TimeoutExpired) as error:
            failures.append(f"{' '.join(command)}: {error}")
    if failures:
        log.warning("%s: torch's own operations serve: %s", source.name, "; ".join(failures))
    else:
        log.info("no C compiler here (%s): torch's operations serve", ", ".join(COMPILERS))
    return None


def _load(command: tuple[str, ...], source: Path, constants: dict[str, int]) -> ctypes.CDLL:
    flags = (*FLAGS, f"-I{_HEADERS}", *(f"-D{k}={v}" for k, v in sorted(constants.items())))
    name = f"{source.stem}-{_fingerprint(command, source, constants)}.so"
    with _directory(name) as directory:
        if not (directory / name).exists():
            _compile(command, flags, source, directory / name)
        return ctypes.CDLL(str(directory / name))


@contextmanager
def _directory(name: str) -> Iterator[Path]:
    """The cache's, or where `name` is not there and cannot be made, one of this process that is
    gone after: a loaded library needs no file."""
    try:
        path = cache_directory()
        if not (path / name).exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except OSError:
        with tempfile.TemporaryDirectory(prefix="spmdrl-") as made:
            yield Path(made)
    else:
        yield path


def cache_directory() -> Path:
    """Where compiled kernels are kept: the user's alone, since what lies there is run.

    Raises:
        OSError: it cannot be made, there is no home, or somebody else may write there.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        raise FileNotFoundError(str(error)) from None
    path = Path(base) / "spmdrl" / "kernels"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not this user's alone")
    return path


def _compile(command: tuple[str, ...], flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Atomic, since ranks that share a home directory start together."""
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        out = Path(made) / target.name
        subprocess.run(
            [*command, *flags, str(source), "-o", str(out), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        # one that another rank has mapped stays: over NFS it would be gone from under it
        if not target.exists():
            out.replace(target)


def _fingerprint(command: tuple[str, ...], source: Path, constants: dict[str, int]) -> str:
    """Of what the library is made of: text, compiler, processor."""
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S
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


def _compilers() -> list[tuple[str, ...]]:
    """The commands to try, `$CC` with its words first."""
    given = tuple(shlex.split(os.environ.get("CC", "")))
    return [c for c in (given, *((name,) for name in COMPILERS)) if c and shutil.which(c[0])]
