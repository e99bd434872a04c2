"""Rounds: portions of a sync, so that no rank stages more than a slot at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.weights.cells import Pattern
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
    loads: dict[int, Tensor] = {}
    rounds: list[Round] = []
    current: list[CellRange] = []
    load = torch.zeros(world_size, dtype=torch.int64)

    def close() -> None:
        nonlocal current
        if current:
            rounds.append(tuple(current))
        current = []
        load.zero_()

    for wanted in ranges:
        cells = patterns[wanted.pattern]
        if wanted.pattern not in loads:
            loads[wanted.pattern] = _load(cells, routes, world_size)
        own = loads[wanted.pattern]
        if int((load + own).max()) <= slot:
            current.append(wanted)
            load += own
            continue
        close()
        if int(own.max()) <= slot:
            current.append(wanted)
            load += own
            continue
        first = 0
        for i in range(wanted.first, wanted.last):
            load_of_cell = _load(cells[i : i + 1], routes, world_size)
            if int((load + load_of_cell).max()) > slot and i > first:
                current.append(CellRange(wanted.name, wanted.pattern, first, i))
                close()
                first = i
            load += load_of_cell
        current.append(CellRange(wanted.name, wanted.pattern, first, wanted.last))
    close()
    return tuple(rounds)


def _load(cells: Pattern, routes: Sequence[Route], world_size: int) -> Tensor:
    """Upper bound of the bytes that each rank stages: those it sends, receives and passes on."""
    by_rank: Counter[int] = Counter()
    by_group: Counter[Ranks] = Counter()
    for cell, number in cells:
        # buffers begin at multiples of 16 bytes
        route, num_bytes = routes[number], -(-cell.num_bytes // 16) * 16
        for pair in route.sends:
            for rank in pair:
                by_rank[rank] += num_bytes
        for _, group in route.casts:
            by_group[group] += num_bytes
    load = torch.zeros(world_size, dtype=torch.int64)
    for group, count in by_group.items():
        load[list(group)] += count
    if by_rank:
        load[list(by_rank)] += torch.tensor(list(by_rank.values()))
    return load
