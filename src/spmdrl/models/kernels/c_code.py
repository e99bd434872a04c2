"""C kernels for the CPU, compiled on the machine that runs them, for its processor.

A wheel would contain code for the oldest processor. Compiling a small C file takes a second, once:
the library is kept in the user's cache directory, under a name with a hash of everything that it
was made from. Without a compiler, torch's own operations are used.
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
"""Compilers in order of preference: a site's module brings a new gcc, but keeps the old cc."""
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
    """Compile and load a C file, with `constants` defined; None, and a line in the log, if that is
    impossible here.

    The compiler is `$CC` or the first of `COMPILERS` that compiles it. gcc's OpenMP is the one that
    torch has loaded under the same name, so that one pool of threads exists; clang has its own.
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
    """Yield the cache's directory, or, if `name` does not exist there and cannot be made, a
    temporary one, which is removed afterwards: a loaded library needs no file."""
    try:
        path = cache_directory()
        if not (path / name).exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written")
    except OSError:
        with tempfile.TemporaryDirectory(prefix="spmdrl-") as made:
            yield Path(made)
    else:
        yield path


def cache_directory(name: str = "kernels") -> Path:
    """Return a directory in the user's cache, which only the user can use: kernels are run.

    Raises:
        OSError: it cannot be made, there is no home, or other users have access to it.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        raise FileNotFoundError(str(error)) from None
    path = Path(base) / "spmdrl" / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} does not belong only to this user")
    return path


def _compile(command: tuple[str, ...], flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Compile atomically, since ranks that share a home directory start together."""
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        out = Path(made) / target.name
        subprocess.run(
            [*command, *flags, str(source), "-o", str(out), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        # A file that another rank has mapped stays: over NFS a replaced file would vanish for it.
        if not target.exists():
            out.replace(target)


def _fingerprint(command: tuple[str, ...], source: Path, constants: dict[str, int]) -> str:
    """Hash everything that the library is made from: source, compiler, flags, processor."""
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S
    ).stdout
    texts = [p.read_text(encoding="utf-8") for p in (source, *sorted(_HEADERS.glob("*.h")))]
    parts = (*texts, version, repr(FLAGS), repr(sorted(constants.items())), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Describe the processor by the properties that -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compilers() -> list[tuple[str, ...]]:
    """List the commands to try, `$CC` with its arguments first."""
    given = tuple(shlex.split(os.environ.get("CC", "")))
    return [c for c in (given, *((name,) for name in COMPILERS)) if c and shutil.which(c[0])]
