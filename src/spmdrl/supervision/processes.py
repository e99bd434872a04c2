"""Processes of this host, read from /proc. Imports nothing heavy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that has not ended: its id and those of its parent, group and session."""

    pid: int
    parent: int
    group: int
    session: int


def processes() -> Iterator[Process]:
    """All visible processes except zombies."""
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
    """Children of a process, their children and so on, without orphans."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.parent, []).append(process)
    found, new = [], children.get(pid, [])
    while new:
        found += new
        new = [child for process in new for child in children.get(process.pid, ())]
    return found
