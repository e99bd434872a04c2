"""What data are known by: digests and counts that a checkpoint keeps, equal on all ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

MARK_BYTES = 8


def row_mark(values: Mapping[str, Any]) -> bytes:
    """A digest of a row's columns, whatever their order.

    Raises:
        ValueError, RecursionError: it cannot be written as JSON.
    """
    text = json.dumps(sorted(values.items()), default=_described, skipkeys=True)
    return hashlib.blake2b(text.encode(), digest_size=MARK_BYTES).digest()


def _described(value: Any) -> str:
    """What JSON does not know: equal on every rank, so no address of an object."""
    if isinstance(value, bytes | bytearray):
        return hashlib.blake2b(value, digest_size=MARK_BYTES).hexdigest()
    kind = type(value)
    return str(value) if kind.__module__ in ("datetime", "decimal", "uuid") else kind.__qualname__
