"""`WeightLayout`: what every rank holds of a model, as slices of the Hugging Face name space.

Layouts are pure functions of a model's shapes and a mesh's degrees: every rank knows what every
other rank holds, and a plan can be made (and printed) where no process runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from spmdrl.distributed.mesh import coordinates
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Slice, all_slices, local_parameters, restrict


@dataclass(frozen=True, kw_only=True)
class Held:
    """One local tensor: its shape, dtype, and the slices that lie in it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[Slice, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


WeightLayout = Mapping[int, Mapping[str, Held]]
"""World rank -> local name -> what is held there."""


def model_layout(
    config: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    dtype: torch.dtype,
) -> dict[int, dict[str, Held]]:
    """The layout of a role: tensor-parallel parameters, cut along dim 0 by FSDP where dp_shard > 1.

    FSDP2 shards over dp_shard x cp as `torch.chunk` does: the first ranks get ceil(rows / n).
    """
    tp = degrees.get("tp", 1)
    sharded = degrees.get("dp_shard", 1) > 1
    num_shards = degrees.get("dp_shard", 1) * degrees.get("cp", 1) if sharded else 1
    shapes = local_parameters(config, tp)
    by_tp = [all_slices(config, rank, tp) for rank in range(tp)]
    layout = {}
    for rank, place in zip(ranks, coordinates(degrees), strict=True):
        shard = place["dp_shard"] * degrees.get("cp", 1) + place["cp"] if sharded else 0
        layout[rank] = {
            name: _shard(Held(shape=shapes[name], dtype=dtype, slices=held), shard, num_shards)
            for name, held in by_tp[place["tp"]].items()
        }
    return layout


def _shard(held: Held, index: int, count: int) -> Held:
    if count == 1:
        return held
    rows = held.shape[0]
    chunk = -(-rows // count)
    first, last = min(index * chunk, rows), min((index + 1) * chunk, rows)
    return replace(
        held,
        shape=(last - first, *held.shape[1:]),
        slices=restrict(held.slices, first, last),
    )


def local_box(tensor: torch.Tensor, held: Slice) -> torch.Tensor:
    """The view of a local tensor where the slice lies."""
    return tensor[held.offset : held.offset + held.rows]


def overlap(a: Slice, b: Slice) -> tuple[tuple[int, int], ...] | None:
    """The global ranges that two slices of one tensor share, or None."""
    ranges = tuple(
        (max(a0, b0), min(a1, b1))
        for a0, a1, b0, b1 in zip(a.start, a.stop, b.start, b.stop, strict=True)
    )
    return ranges if all(low < high for low, high in ranges) else None


def within(ranges: Sequence[tuple[int, int]], held: Slice) -> tuple[slice, ...]:
    """Global ranges as an index into the box of `held`."""
    return tuple(
        slice(low - start, high - start)
        for (low, high), start in zip(ranges, held.start, strict=True)
    )
