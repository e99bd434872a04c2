"""Rounds: portions of a sync, so that no rank stages more than a slot at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from spmdrl.weights.cells import Cell, Pattern
from spmdrl.weights.routes import Route


@dataclass(frozen=True, slots=True)
class CellRange:
    """Cells `[first, last)` of a tensor, by their index in the tensor's pattern."""

    name: str
    pattern: int
    first: int
    last: int


Round = tuple[CellRange, ...]


def make_rounds(
    ranges: Iterable[CellRange],
    patterns: Sequence[Pattern],
    routes: Sequence[Route],
    slot: int,
    world_size: int,
) -> tuple[Round, ...]:
    """Group the ranges in order, cut so that no rank stages more than `slot` bytes (or a cell)."""
    units = [_unit(route) for route in routes]
    totals: dict[int, _Load] = {}
    cuts: dict[tuple[int, int, int], _Cut] = {}  # layers have the same patterns
    rounds: list[Round] = []
    current: list[CellRange] = []
    load = np.zeros(world_size, dtype=np.int64)

    def close() -> None:
        nonlocal current
        if current:
            rounds.append(tuple(current))
        current = []
        load.fill(0)

    for wanted in ranges:
        cells = patterns[wanted.pattern]
        if wanted.pattern not in totals:
            totals[wanted.pattern] = _total(cells, units, world_size)
        own = totals[wanted.pattern]
        if not own.fits(load, slot):
            close()
        if own.fits(load, slot):
            current.append(wanted)
            own.add_to(load)
            continue
        key = (wanted.pattern, wanted.first, wanted.last)
        if key not in cuts:
            cuts[key] = _cut(cells, wanted.first, wanted.last, units, slot, world_size)
        *parts, (first, last) = cuts[key].parts
        rounds += [(CellRange(wanted.name, wanted.pattern, *part),) for part in parts]
        current.append(CellRange(wanted.name, wanted.pattern, first, last))
        load += cuts[key].load
    close()
    return tuple(rounds)


@dataclass(frozen=True, slots=True)
class _Load:
    """Upper bound of the bytes that ranks stage: those they send, receive and pass on.

    Only these ranks' loads change, so only they are looked at: a sync of thousands of ranks has
    millions of cells, and each concerns few.
    """

    ranks: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    def fits(self, load: NDArray[np.int64], slot: int) -> bool:
        return not len(self.ranks) or int((load[self.ranks] + self.num_bytes).max()) <= slot

    def add_to(self, load: NDArray[np.int64]) -> None:
        load[self.ranks] += self.num_bytes


@dataclass(frozen=True, slots=True)
class _Cut:
    """Cells of one range in as many rounds as they need.

    Args:
        parts: first and last of each round's cells.
        load: bytes that each rank stages in the last of these rounds.
    """

    parts: Sequence[tuple[int, int]]
    load: NDArray[np.int64]


def _cut(
    cells: Pattern, first: int, last: int, units: Sequence[_Load], slot: int, world_size: int
) -> _Cut:
    parts, load = [], np.zeros(world_size, dtype=np.int64)
    for i in range(first, last):
        of_cell = _of_cell(cells[i], units)
        if i > first and not of_cell.fits(load, slot):
            parts.append((first, i))
            load.fill(0)
            first = i
        of_cell.add_to(load)
    return _Cut([*parts, (first, last)], load)


def _unit(route: Route) -> _Load:
    """Count how often each rank of a route stages a cell."""
    groups = [group for _, group in route.casts]
    ranks = np.array([*chain(*route.sends, *groups)], dtype=np.int64)
    return _Load(*np.unique(ranks, return_counts=True))


def _of_cell(routed: tuple[Cell, int], units: Sequence[_Load]) -> _Load:
    cell, number = routed
    # buffers begin at multiples of 16 bytes
    unit = units[number]
    return _Load(unit.ranks, unit.num_bytes * (-(-cell.num_bytes // 16) * 16))


def _total(cells: Pattern, units: Sequence[_Load], world_size: int) -> _Load:
    total = np.zeros(world_size, dtype=np.int64)
    for routed in cells:
        _of_cell(routed, units).add_to(total)
    [ranks] = total.nonzero()
    return _Load(ranks, total[ranks])
