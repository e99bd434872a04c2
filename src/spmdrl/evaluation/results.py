"""Per-sample results as JSONL, complete or not there at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spmdrl.files import replace_file


def write_results(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write a JSON object per line; how many. A float that is not finite becomes null.

    Raises:
        OSError: the disk is full, or another fault of the file system; an older file stays whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_line(_finite(row)) for row in rows]
    replace_file(path, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def _line(row: Any) -> str:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates: JSON can write it, UTF-8 cannot
        return json.dumps(row, allow_nan=False, default=str)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
