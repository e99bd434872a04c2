"""Per-sample results as JSONL files, written completely or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spmdrl.atomic_files import finite_json, replace_file


def write_results(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a JSON object per line; return their number. A float that is not finite becomes null.

    Raises:
        OSError: the disk is full, or the file system fails otherwise; an older file stays whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [finite_json(row) for row in rows]
    replace_file(path, "".join(line + "\n" for line in lines).encode())
    return len(lines)
