"""Files and directories that appear whole or not at all, and old ones that are never lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, fsync, rename over it; the old file stays when this fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def atomic_directory(out_dir: str | Path) -> Iterator[Path]:
    """A new directory to write into, which takes the name `out_dir` when the block ends well.

    Every file in it is fsynced before the rename. An older `out_dir` is kept until then and removed
    after; when the block fails, the new directory is removed and the older one is as it was.

    Raises:
        OSError: a file could not be written (a full disk, say); names `out_dir`.
    """
    target = Path(out_dir).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        yield fresh
        for file in [*fresh.rglob("*"), fresh]:
            sync(file)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        sync(target.parent)
    except OSError as error:
        raise OSError(
            f"{out_dir} could not be saved ({error}); what was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def set_aside(path: Path) -> Path | None:
    """Rename `path` to `path.old-1` (or -2, ...) if it is there; the new name."""
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
