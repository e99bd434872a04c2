"""Names of docs/metrics.md, to hold the metrics of runs against."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

ANY = r"(?:NAME|PHASE|SET|ROLE|K|X)"
"""Parts of the page's names that stand for others."""


def undocumented(records: Iterable[Mapping[str, object]]) -> list[str]:
    """Names in records of metrics.jsonl that no row of the page has."""
    cells = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    patterns = [re.sub(rf"\b{ANY}\b|(?<=_)X|(?<=@)K", r"[^ ]+", re.escape(n)) for n in names]
    known = re.compile("|".join(f"(?:{pattern})" for pattern in [*patterns, "step", "wall_time"]))
    found = {name for record in records for name in record}
    return sorted(name for name in found if not known.fullmatch(name))
