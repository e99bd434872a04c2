"""Rounds: portions of a sync, so that no rank stages more than a slot at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from spmdrl.weights.cells import Cell, Pattern
from spmdrl.weights.routes import Ranks, Route


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
    units = _Units(routes)
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


class _Units:
    """Loads of a cell of one byte by the number of its route, made when one is asked for: the
    rounds of frozen weights have few cells, or none, among as many routes.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes
        self._made: dict[int, _Load] = {}
        self._members: dict[Ranks, NDArray[np.int64]] = {}

    def __getitem__(self, number: int) -> _Load:
        if number not in self._made:
            self._made[number] = self._unit(self._routes[number])
        return self._made[number]

    def _unit(self, route: Route) -> _Load:
        """Count how often each rank of a route stages a cell."""
        ends = [*chain(*route.sends)]
        if len(route.casts) != 1 or len(ends) > 2:
            groups = [group for _, group in route.casts]
            ranks = np.array([*chain(ends, *groups)], dtype=np.int64)
            return _Load(*np.unique(ranks, return_counts=True))
        # most routes of a large world: one message, and one of a few groups of many ranks
        [(_, group)] = route.casts
        if group not in self._members:
            self._members[group] = np.array(group, dtype=np.int64)
        ranks, counts = self._members[group], np.ones(len(group), dtype=np.int64)
        others = []  # a message has two ranks, which differ
        for rank in ends:
            at = bisect_left(group, rank)
            if at < len(group) and group[at] == rank:
                counts[at] += 1
            else:
                others.append(rank)
        if others:
            ranks = np.concatenate((ranks, others))
            counts = np.concatenate((counts, np.ones(len(others), dtype=np.int64)))
        return _Load(ranks, counts)


def _cut(cells: Pattern, first: int, last: int, units: _Units, slot: int, world_size: int) -> _Cut:
    parts, load = [], np.zeros(world_size, dtype=np.int64)
    for i in range(first, last):
        of_cell = _of_cell(cells[i], units)
        if i > first and not of_cell.fits(load, slot):
            parts.append((first, i))
            load.fill(0)
            first = i
        of_cell.add_to(load)
    return _Cut([*parts, (first, last)], load)


def _of_cell(routed: tuple[Cell, int], units: _Units) -> _Load:
    cell, number = routed
    # buffers begin at multiples of 16 bytes
    unit = units[number]
    return _Load(unit.ranks, unit.num_bytes * (-(-cell.num_bytes // 16) * 16))


def _total(cells: Pattern, units: _Units, world_size: int) -> _Load:
    total = np.zeros(world_size, dtype=np.int64)
    for routed in cells:
        _of_cell(routed, units).add_to(total)
    [ranks] = total.nonzero()
    return _Load(ranks, total[ranks])
