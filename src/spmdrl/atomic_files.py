"""Files and directories that appear as a whole or not at all, and old ones that are never lost."""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes, *, lasting: bool = True) -> None:
    """Write `content` to a temporary file, fsync, rename to `path`; a failure keeps the old file.

    Args:
        lasting: whether it must survive a crash of the machine; False saves the two fsyncs.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if lasting:
        sync(path.parent)


@contextmanager
def atomic_directory(out_dir: str | Path) -> Iterator[Path]:
    """A new directory to write into, which takes the name `out_dir` if the block succeeds.

    Every file in it is fsynced before the rename. An older `out_dir` is kept until then and removed
    after; if the block fails, the new directory is removed and the older one is unchanged. If the
    process is killed between the two renames, `bring_back` finds the older one.

    Raises:
        OSError: a file could not be written (a full disk, say); `out_dir` is named.
    """
    target = Path(out_dir).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        bring_back(target.parent, target.name)
        fresh.mkdir()
        yield fresh
        for file in [*fresh.rglob("*"), fresh]:
            sync(file)
        _exchange(fresh, target, old)
        sync(target.parent)
    except OSError as error:
        raise OSError(
            f"{out_dir} could not be saved ({error}); its earlier content is untouched"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _exchange(fresh: Path, target: Path, old: Path) -> None:
    """Put `fresh` in the place of `target`, which becomes `old`; on failure nothing changes."""
    if not target.exists():
        fresh.rename(target)
        return
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise


def bring_back(parent: Path, name: str | None = None) -> list[Path]:
    """Rename back directories below `parent` that a killed process had renamed in order to replace
    them (`.NAME.PID.old`), if NAME does not exist; returns the restored paths.

    Args:
        name: the only directory to look for, or None for any.
    """
    found = []
    olds = parent.glob(f".{'*' if name is None else glob.escape(name)}.*.old")
    for old in sorted(olds, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        target = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if not target.exists():
            old.rename(target)
            found.append(target)
    return found


def set_aside(path: Path) -> Path | None:
    """Rename `path` to `path.old-1` (or -2, ...) if it exists; returns the new path, else None."""
    if not path.exists():
        return None
    aside = next(p for n in count(1) if not (p := Path(f"{path}.old-{n}")).exists())
    path.rename(aside)
    sync(path.parent)
    return aside


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite_json(value: object) -> str:
    """A value as one line of JSON; a non-finite float becomes null, because JSON has none.

    Letters are not escaped: split such lines only at line feeds, because `str.splitlines` also
    splits at U+0085 and U+2028, which may occur within a text.
    """
    finite = _finite(value)
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates: JSON can write it, UTF-8 cannot
        return json.dumps(finite, allow_nan=False, default=str)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
