"""Rounds: portions of a sync, so that no rank stages more than a slot at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.weights.patterns import Routed
from spmdrl.weights.routes import Ranks, Route


@dataclass(frozen=True, slots=True)
class Span:
    """Cells `[first, last)` of a tensor, by their index in the tensor's pattern."""

    name: str
    pattern: int
    first: int
    last: int


Round = tuple[Span, ...]


def make_rounds(
    spans: Iterable[Span],
    patterns: Sequence[Sequence[Routed]],
    routes: Sequence[Route],
    slot: int,
    world_size: int,
) -> tuple[Round, ...]:
    """Spans in order, cut so that no rank stages more than `slot` bytes (or a cell) in a round."""
    loads: dict[int, Tensor] = {}
    rounds: list[Round] = []
    current: list[Span] = []
    load = torch.zeros(world_size, dtype=torch.int64)

    def close() -> None:
        nonlocal current
        if current:
            rounds.append(tuple(current))
        current = []
        load.zero_()

    for span in spans:
        cells = patterns[span.pattern]
        if span.pattern not in loads:
            loads[span.pattern] = _load(cells, routes, world_size)
        own = loads[span.pattern]
        if int((load + own).max()) <= slot:
            current.append(span)
            load += own
            continue
        close()
        if int(own.max()) <= slot:
            current.append(span)
            load += own
            continue
        first = 0
        for i in range(span.first, span.last):
            one = _load(cells[i : i + 1], routes, world_size)
            if int((load + one).max()) > slot and i > first:
                current.append(Span(span.name, span.pattern, first, i))
                close()
                first = i
            load += one
        current.append(Span(span.name, span.pattern, first, span.last))
    close()
    return tuple(rounds)


def _load(cells: Iterable[Routed], routes: Sequence[Route], world_size: int) -> Tensor:
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
