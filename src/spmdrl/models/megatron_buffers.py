"""Flat buffers of Megatron's distributed optimizer, cut whatever the parameters' shapes.

Layers are alike, and lie alike in a buffer: a shard has some of them whole, and parts of a few. All
functions here are pure, and depend on Megatron only by the way it cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from spmdrl.models.megatron_chunks import Parameter, Part

Range = tuple[int, int]
"""Values of a flattened parameter or of a buffer, `[start, stop)`; (0, 0) for none."""


class Laid(Protocol):
    """Something that lies in a flat buffer: a parameter, or several that lie together."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def shared(self) -> bool: ...


def buffer_places(chunk: Sequence[Laid], num_shards: int) -> tuple[dict[str, Range], list[Range]]:
    """Compute the places of a chunk's parameters in its flat buffer, and the buffer's buckets.

    The layout is that of megatron-core's `_ParamAndGradBuffer`: last parameter first, each at a
    multiple of 64 values, in buckets of a multiple of 128 that the shards divide. An embedding that
    two stages hold is a separate bucket, so that both cut it alike.
    """
    unit = math.lcm(num_shards, 128)
    places: dict[str, Range] = {}
    buckets: list[Range] = []
    at = first = 0

    def close(stop: int) -> int:
        buckets.append((first, -(-stop // unit) * unit))
        return buckets[-1][1]

    for parameter in reversed(chunk):
        at = -(-at // 64) * 64
        if parameter.shared and at > first:
            at = first = close(at)
        places[parameter.name] = at, at + math.prod(parameter.shape)
        at = places[parameter.name][1]
        if parameter.shared:
            at = first = close(at)
    if at > first:
        close(at)
    return places, buckets


def shard_range(place: Range, buckets: Sequence[Range], shard: int, num_shards: int) -> Range:
    """Return the range of a flattened parameter that shard `shard` holds; (0, 0) for none."""
    start, stop = place
    first, last = next(bucket for bucket in buckets if bucket[0] <= start < bucket[1])
    size = (last - first) // num_shards
    low = max(start, first + shard * size)
    high = min(stop, first + (shard + 1) * size)
    return (low - start, high - start) if low < high else (0, 0)


def chunk_ranges(
    chunk: Sequence[Parameter], shard: int, num_shards: int, exchange: int = 1
) -> dict[str, Range]:
    """Return `shard_range` of every parameter. Experts have their own buffer; every `exchange`-th
    shard holds the same ones.
    """
    found: dict[str, Range] = {}
    for of_experts in (False, True):
        own = [parameter for parameter in chunk if parameter.is_expert is of_experts]
        part = exchange if of_experts else 1
        if not own:
            continue
        index, count = shard // part, num_shards // part
        places, buckets = buffer_places(own, count)
        found |= {p.name: shard_range(places[p.name], buckets, index, count) for p in own}
    return found


@dataclass(frozen=True, kw_only=True)
class HeldPart:
    """A part of a chunk, and what a shard has of it.

    Args:
        whole: whether it has all rows that are no experts, and all that are.
        ranges: by the rows' numbers, what it has of others.
    """

    part: Part
    whole: tuple[bool, bool]
    ranges: Mapping[int, Range]

    def range_of(self, number: int) -> Range:
        """The values that the shard has of a row."""
        row = self.part.rows[number]
        if self.whole[row.is_expert]:
            return 0, math.prod(row.shape)
        return self.ranges.get(number, (0, 0))


def held_parts(
    parts: Sequence[Part], shard: int, num_shards: int, exchange: int = 1
) -> list[HeldPart]:
    """Return what a shard has of a chunk: the ranges of `chunk_ranges`, with whole layers as such.

    It takes as long as one layer of each kind, and a few steps for each other layer.
    """
    whole = [[False, False] for _ in parts]
    ranges: list[dict[int, Range]] = [{} for _ in parts]
    for of_experts in (False, True):
        divisor = exchange if of_experts else 1
        index, count = shard // divisor, num_shards // divisor
        laid = list(_blocks(parts, of_experts=of_experts))
        places, buckets = buffer_places([block for _, block in laid], count)
        for at, block in laid:
            low, high = shard_range(places[block.name], buckets, index, count)
            whole[at][of_experts] = block.is_layer and (low, high) == (0, block.shape[0])
            if low < high and not whole[at][of_experts]:
                ranges[at] |= block.inside(low, high)
    return [
        HeldPart(part=part, whole=(dense, experts), ranges=found)
        for part, (dense, experts), found in zip(parts, whole, ranges, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Rows that lie together: those of a layer, or one of the others.

    Args:
        shape: number of values, with the padding between rows.
        places: places of the rows, by their numbers.
    """

    name: str
    shape: tuple[int, ...]
    places: Mapping[int, Range]
    shared: bool = False
    is_layer: bool = False

    def inside(self, low: int, high: int) -> dict[int, Range]:
        """Return the values of its rows that a range of the block has."""
        found = {}
        for number, (start, stop) in self.places.items():
            first, last = max(start, low), min(stop, high)
            if first < last:
                found[number] = (first - start, last - start)
        return found


def _blocks(parts: Sequence[Part], *, of_experts: bool) -> Iterator[tuple[int, _Block]]:
    """Yield the blocks of a buffer, each with the number of its part."""
    layers: dict[int, _Block | None] = {}
    for at, part in enumerate(parts):
        if part.layer is None:
            for number, row in enumerate(part.rows):
                if row.is_expert is of_experts:
                    size = math.prod(row.shape)
                    places = {number: (0, size)}
                    yield at, _Block(name=row.name, shape=(size,), places=places, shared=row.shared)
            continue
        if part.first not in layers:
            layers[part.first] = _layer_block(part, of_experts=of_experts)
        block = layers[part.first]
        if block is not None:
            yield at, replace(block, name=f"layers.{part.layer}")


def _layer_block(part: Part, *, of_experts: bool) -> _Block | None:
    rows = [(n, row) for n, row in enumerate(part.rows) if row.is_expert is of_experts]
    if not rows:
        return None
    # the beginning of any row is a multiple of 64 values, so that a layer lies alike everywhere
    found, _ = buffer_places([row for _, row in rows], 1)
    places = {number: found[row.name] for number, row in rows}
    size = max(stop for _, stop in places.values())
    return _Block(name="", shape=(size,), places=places, is_layer=True)
