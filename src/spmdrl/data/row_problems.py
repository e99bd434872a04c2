"""`BadRow`, and the text of a value in its message."""

from __future__ import annotations

from typing import Any


class BadRow(ValueError):
    """Problem of one row."""


def shown(value: Any) -> str:
    """Text of a value for a message, shortened to what helps to find it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, nested too deeply
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"
