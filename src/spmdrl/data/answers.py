"""Reference answers: a column's value, of any type, as the text that reward functions get."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np

from spmdrl.data.messages import BadRow, checked_text


def answer_text(value: Any, column: str, pattern: str | None) -> str:
    """Text of the answer that a column holds.

    Numbers are written as in JSON (decimals with all their digits), dates as ISO 8601, lists as
    JSON.

    Args:
        pattern: regular expression whose group 1 (or whole match) is the answer; None: all of it.

    Raises:
        BadRow: the value is missing (null, NaN, pandas' missing values), a struct (one of its
            fields may be the answer), bytes or infinite; or the pattern is not found.
    """
    text = _text(value, column)
    checked_text(text, column)
    if pattern is None:
        return text
    match = re.search(pattern, text)
    if match is None:
        raise BadRow(f"the answer {text[-80:]!r} does not match {pattern!r}")
    found = match.group(1) if match.re.groups else match.group()
    if found is None:
        raise BadRow(f"the answer {text[-80:]!r} has no group 1 of {pattern!r}")
    return str(found).strip()


def _text(value: Any, column: str) -> str:
    value = _plain(value, column)
    if value is None:
        raise BadRow(f"column {column!r} holds no answer")
    if isinstance(value, Mapping):
        fields = ", ".join(f"{column}.{name}" for name in value)
        raise BadRow(f"column {column!r} holds no answer but fields: name one of {fields}")
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        return f"{value:f}"
    try:
        return json.dumps(value, default=str)
    except (ValueError, RecursionError) as error:
        raise BadRow(
            f"column {column!r} holds an answer that cannot be written: {error}"
        ) from error


def _plain(value: Any, column: str) -> Any:
    """Convert a value from libraries' types to plain ones; None if it means a missing value.

    Raises:
        BadRow: the value is bytes or an infinite number.
    """
    if isinstance(value, np.datetime64 | np.timedelta64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        if value.is_nan() if isinstance(value, Decimal) else math.isnan(value):
            return None
        if not math.isfinite(value):
            raise BadRow(f"column {column!r} holds no answer but {value}")
        return value
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return [_number(_plain(item, column)) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        raise BadRow(f"column {column!r} holds bytes, no answer: store it as text")
    # pandas' NaT and NA are equal to nothing, not even to themselves
    if str(value) in ("NaT", "<NA>"):
        return None
    return value.isoformat() if isinstance(value, date | datetime | time) else str(value)


def _number(value: Any) -> Any:
    """Convert a decimal in a list to a number that JSON can write."""
    if not isinstance(value, Decimal):
        return value
    return int(value) if value == value.to_integral_value() else float(value)
