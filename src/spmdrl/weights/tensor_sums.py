"""Sums of whole tensors at source and target: a proof cheap enough for every sync.

A sum takes a tensor's bits as integers, modulo 2^64, with a weight for each row. It does not depend
on how the tensor is cut, so every rank adds up its own boxes, and one reduction over the world
compares all tensors. It finds tensors that were not updated, or that changed on their way;
`checksums.first_difference` then tells which box differs, and where.

Bits of several values are added as one 64-bit number, at the speed of reading memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.tensors import Slice
from spmdrl.weights.cells import Cell
from spmdrl.weights.plan import SyncPlan
from spmdrl.weights.views import TensorViews

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Values cast at a time: on the CPU as many as fit the cache, on CUDA few kernels."""


_Counted = tuple[int, str, Cell, int]
"""The number and the name of a tensor, a box of it, and how often this rank adds it to the sum.

The box is one of the tensor's cells, or several together; its dtype is the one that travels.
"""


class TensorSums:
    """Compares, for every tensor that a plan moves, the source's values with the targets'.

    Args:
        views: this rank's tensors.
        device: device of the reduction over the world.
    """

    def __init__(self, plan: SyncPlan, views: TensorViews, rank: int, device: torch.device) -> None:
        patterns = _patterns(plan)
        self._names = tuple(patterns)
        self._tensors, self._device = views, device
        self._source = tuple(_terms(plan, patterns, views.source_slices, _served_by(rank)))
        self._target = tuple(_terms(plan, patterns, views.target_slices, _wanted_by(rank)))

    @torch.no_grad()
    def differing(self) -> list[str]:
        """The tensors that differ between source and targets, equal on every rank.

        Every rank of the world calls it, after a sync.
        """
        found: dict[torch.device, list[tuple[int, int, Tensor]]] = {}
        for number, view, box, times in self._views():
            found.setdefault(view.device, []).append((number, times, tensor_sum(view, box)))
        total = torch.zeros(len(self._names), dtype=torch.int64)
        for own in found.values():  # source or target may be on the host
            numbers, times_of, sums = zip(*own, strict=True)
            parts = torch.stack(sums).cpu() * torch.tensor(times_of)
            total.index_add_(0, torch.tensor(numbers), parts)
        self._tensors.forget()
        total = total.to(self._device)
        dist.all_reduce(total)
        return [name for name, rest in zip(self._names, total.tolist(), strict=True) if rest]

    def _views(self) -> Iterator[tuple[int, Tensor, Cell, int]]:
        """(tensor's number, view to sum, its box, factor): the source's cancel the targets'."""
        for number, name, box, times in self._source:
            value = self._tensors.source(name, box)
            assert value is not None, (name, box)
            yield number, value, box, -times
        for number, name, box, _ in self._target:
            first, *copies = self._tensors.target(name, box)
            yield number, first, box, 1
            for copy in copies:  # one box in two tensors, which the source counts once
                yield number, first, box, -_COPY
                yield number, copy, box, _COPY


_COPY = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd factor, so that a difference between copies does not cancel against anything."""


_NEXT_DIM = 1 << 40


def tensor_sum(values: Tensor, box: Cell) -> Tensor:
    """The box's part of its tensor's sum, int64: rows (in one dim, values) times their weights.

    A row's sum takes its bytes as little-endian 64-bit numbers from the start of the row. In a
    tensor of more dims, a row's weight is the product of one for each of its indices.

    Args:
        values: values of the box's shape, in any dtype that can hold those of `box.dtype`.
    """
    rows, last = len(values), values.shape[-1]
    size = max(1, values[:1].numel())
    step = rows if values.dtype == box.dtype else max(1, _BLOCK[values.device.type] // size)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, rows, step):
        block = values[start : start + step].to(box.dtype)
        weights = row_weights(box.start[0] + start, len(block), values.device)
        sums = _row_sums(block, box.start[-1], last) if block.dim() > 1 else _bits(block)
        for dim in range(sums.dim() - 1, 0, -1):
            first = box.start[dim] + dim * _NEXT_DIM  # an index counts otherwise in each dim
            sums = (sums * row_weights(first, sums.shape[dim], values.device)).sum(dim)
        total += (sums * weights).sum()
    return total


def row_weights(first: int, count: int, device: torch.device) -> Tensor:
    """Odd 64-bit numbers without any pattern: splitmix64's mixer of the row's number."""
    x = torch.arange(first + 1, first + 1 + count, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x | 1


def _row_sums(block: Tensor, first: int, width: int) -> Tensor:
    """Sums of the rows, whose columns `[first, first + width)` are in the block."""
    lanes = 8 // block.element_size()
    aligned = block.stride(-1) == 1 and not any(
        number % lanes for number in (first, width, block.storage_offset(), *block.stride()[:-1])
    )
    if aligned:
        return block.view(torch.int64).sum(-1)
    columns = torch.arange(first, first + width, device=block.device) % lanes
    return (_bits(block) << columns * (8 * block.element_size())).sum(-1)


def _bits(block: Tensor) -> Tensor:
    """The values' bits as non-negative numbers (those of 8 bytes unchanged)."""
    size = block.element_size()
    bits = block.view(_BITS[size]).to(torch.int64)
    return bits if size == 8 else bits & ((1 << (8 * size)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _patterns(plan: SyncPlan) -> dict[str, int]:
    """Tensors that the plan moves, in its order, with their patterns."""
    rounds = (*plan.frozen_rounds, *plan.rounds)
    return {cells.name: cells.pattern for one in rounds for cells in one}


_Counts = Callable[[Cell, int], int]
"""Returns the number of times that this rank counts a cell of a tensor with a pattern."""


def _served_by(rank: int) -> _Counts:
    """Count a cell once per target, on one of its holders, which depends on the pattern."""

    def times(cell: Cell, pattern: int) -> int:
        chosen = cell.holders[pattern % len(cell.holders)]
        return len(cell.wanting) if chosen == rank else 0

    return times


def _wanted_by(rank: int) -> _Counts:
    return lambda cell, _: int(rank in cell.wanting)


def _terms(
    plan: SyncPlan,
    patterns: Mapping[str, int],
    pieces_of: Callable[[str], Sequence[Slice]],
    times: _Counts,
) -> Iterator[_Counted]:
    """Yield what this rank counts. Tensors with equal cuts and local boxes are examined once."""
    known: dict[object, tuple[tuple[Cell, int], ...]] = {}
    counted: dict[int, list[tuple[Cell, int]]] = {}
    for number, (name, pattern) in enumerate(patterns.items()):
        pieces = tuple((piece.start, piece.stop) for piece in pieces_of(name))
        if not pieces:
            continue
        if pattern not in counted:
            cells = [(cell, times(cell, pattern)) for cell, _ in plan.patterns[pattern]]
            counted[pattern] = [(cell, count) for cell, count in cells if count]
        if (pattern, pieces) not in known:
            known[pattern, pieces] = tuple(_together(counted[pattern], pieces))
        for box, count in known[pattern, pieces]:
            yield number, name, box, count


_Box = tuple[tuple[int, ...], tuple[int, ...]]


def _together(
    cells: Iterable[tuple[Cell, int]], pieces: Sequence[_Box]
) -> Iterator[tuple[Cell, int]]:
    """Merge cells that fill a piece and count alike into one box; leave the others unchanged."""
    left = list(cells)
    for start, stop in pieces:
        inside = [i for i, (cell, _) in enumerate(left) if _lies_in(cell, start, stop)]
        chosen = [left[i] for i in inside]
        if len({(cell.dtype, count) for cell, count in chosen}) != 1:
            continue
        cell, count = chosen[0]
        whole = replace(cell, start=start, stop=stop)
        shared = [p for p in pieces if p != (start, stop) and _overlap(p, (start, stop))]
        if not shared and sum(c.num_bytes for c, _ in chosen) == whole.num_bytes:
            yield whole, count
            left = [item for i, item in enumerate(left) if i not in set(inside)]
    yield from left


def _lies_in(cell: Cell, start: tuple[int, ...], stop: tuple[int, ...]) -> bool:
    bounds = zip(start, cell.start, cell.stop, stop, strict=True)
    return all(a <= low and high <= b for a, low, high, b in bounds)


def _overlap(one: _Box, other: _Box) -> bool:
    bounds = zip(*one, *other, strict=True)
    return all(max(a, c) < min(b, d) for a, b, c, d in bounds)
