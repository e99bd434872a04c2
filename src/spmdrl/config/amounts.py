"""Amounts: a count, or a share (`10%`) of however many there are."""

from __future__ import annotations

import re
from typing import Any

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")

Amount = int | str
"""A count, or a share as `share_text` writes it; 0 is none."""


def read_amount(value: Any) -> Amount:
    """Read a count or a share from a configuration's value. ValueError: it is neither."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    text = value.strip() if isinstance(value, str) else ""
    if re.fullmatch("[0-9]+", text):
        return int(text)
    if (found := _SHARE.fullmatch(text)) is None or not float(found[1]) <= 100:
        raise ValueError("write a count (128), or a share of what there is (10%)")
    return share_text(float(found[1])) if float(found[1]) else 0


def read_share(value: Any) -> str:
    """Read a share above 0% from a configuration's value. ValueError: it is none."""
    found = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or not 0 < float(found[1]) <= 100:
        raise ValueError("write a share, above 0% and at most 100%")
    return share_text(float(found[1]))


def share_text(percent: float) -> str:
    """Canonical text of a share: `10%`, `2.5%`."""
    return f"{percent:g}%"


def share_of(share: str) -> float:
    """Convert `10%` to 0.1."""
    return float(share.removesuffix("%")) / 100


def count_of(amount: Amount, total: int, at_most: int | None = None) -> int:
    """Convert an amount of `total` to a count; a share is rounded, and is at least one.

    Args:
        at_most: upper bound on the count of a share; None: no bound.
    """
    if isinstance(amount, int):
        return amount
    count = max(1, round(share_of(amount) * total))
    return count if at_most is None else min(count, at_most)


def read_part(part: str) -> tuple[int, int, int]:
    """Read (first, last, number of parts): `2/3` is (2, 2, 3), `2-3/4` (2, 3, 4), `all` (1, 1, 1).

    Raises:
        ValueError: the text describes no part.
    """
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?/([0-9]+)", "1/1" if part == "all" else part)
    if match is not None:
        first, last, count = (int(x) for x in (match[1], match[2] or match[1], match[3]))
        if 1 <= first <= last <= count:
            return first, last, count
    raise ValueError("write all, 2/3 for the second of three, or 2-3/4 for two of four")
