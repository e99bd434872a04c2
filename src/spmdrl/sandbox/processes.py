"""Processes by parent, from /proc."""

from __future__ import annotations

import contextlib
from pathlib import Path


def children_by_parent() -> dict[int, list[int]]:
    """Map parents to their children, for all visible processes that have not ended."""
    found: dict[int, list[int]] = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(directory.name))
    return found


def descendants(pid: int) -> list[int]:
    """Return the children of a process, theirs, and so on, nearest first."""
    children = children_by_parent()
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, ())]
        found += new
    return found
