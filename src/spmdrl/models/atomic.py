"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
    fresh = target.with_name(f".{target.name}.tmp")
    old = target.with_name(f".{target.name}.old")
    _restore(old, target)  # of a process that was killed between the two renames
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        yield fresh
        for path in [*fresh.rglob("*"), fresh]:
            sync(path)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{out_dir} could not be saved ({error}); what was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _restore(old, target)


def _restore(old: Path, target: Path) -> None:
    """After a failed rename the older directory gets its name back; after a good one it goes."""
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
