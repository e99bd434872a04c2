"""Processes of this host, as /proc shows them. Imports nothing heavy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that has not ended: its number and those of its parent, group and session."""

    pid: int
    parent: int
    group: int
    session: int


def processes() -> Iterator[Process]:
    """All that are seen here, without zombies."""
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            text = (directory / "stat").read_text(encoding="utf-8", errors="replace")
            state, parent, group, session = text.rpartition(")")[2].split()[:4]
            if state not in "ZX":
                yield Process(
                    pid=int(directory.name),
                    parent=int(parent),
                    group=int(group),
                    session=int(session),
                )


def descendants(pid: int) -> list[Process]:
    """What a process has started and that has started, but not what was left by its parent."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found, new = [], children.get(pid, [])
    while new:
        found += new
        new = [child for process in new for child in children.get(process.pid, ())]
    return found
