"""Per-sample results as JSONL, complete or not there at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_results(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a JSON object per line; how many.

    The rows go to a temporary file beside `path`, which is synced to the disk and then renamed: an
    older file stays whole until the new one is. A float that is not finite becomes null.

    Raises:
        OSError: the disk is full, or another fault of the file system; the temporary file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str)
                file.write(line + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)
    return count


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
