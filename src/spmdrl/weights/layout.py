"""`WeightLayout`: what every rank holds of a model, as slices of the Hugging Face name space.

Layouts are pure functions of a model's shapes and a mesh's degrees: every rank knows what every
other rank holds, and a plan can be made (and printed) where no process runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from spmdrl.distributed.expert_axes import expert_degrees, expert_place
from spmdrl.distributed.mesh import coordinates
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import (
    Head,
    Slice,
    all_slices,
    is_expert_parameter,
    local_parameters,
    restrict,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One local tensor: its shape, dtype, and the slices that lie in it.

    Rows that no slice covers are padding (of a vocabulary, say). Experts that are stacked in one
    tensor are slices below each other.

    Args:
        frozen: the values never change: they move in the first sync alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[Slice, ...]
    frozen: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def is_like(self, other: Held) -> bool:
        """Whether one storage can serve as both."""
        return (self.shape, self.dtype, self.slices) == (other.shape, other.dtype, other.slices)


Table = Mapping[str, Held]
"""Local name -> what one rank holds there."""

WeightLayout = Mapping[int, Table]
"""World rank -> its table; ranks that hold the same may share one table."""


LocalTensors = Mapping[str, tuple[torch.Tensor, tuple[Slice, ...]]]
"""Local name -> this rank's tensor, and the slices that lie in it."""


def model_layout(
    config: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    dtype: torch.dtype,
    head: Head = "lm",
    frozen: Collection[str] = (),
    vocab_multiple: int = 1,
) -> dict[int, Table]:
    """The layout of a role: tensor-parallel parameters, cut along dim 0 by FSDP where dp_shard > 1.

    FSDP2 shards over dp_shard x cp as `torch.chunk` does: the first ranks get ceil(rows / n). Of
    these ranks, those that hold the same experts shard them (see `distributed.expert_axes`).
    Pipeline stages hold consecutive layers; the first has the embedding, the last the norm and the
    head (which is the embedding again where they are tied). Ranks with the same pp, tp, ep and
    shard coordinates share one table.

    Args:
        frozen: Hugging Face names of parameters that are not trained.
        vocab_multiple: the vocabulary's rows are padded to a multiple of it.
    """
    tp, cp, pp = degrees.get("tp", 1), degrees.get("cp", 1), degrees.get("pp", 1)
    sharded = degrees.get("dp_shard", 1) > 1
    num_shards = degrees.get("dp_shard", 1) * cp if sharded else 1
    ep, exchange = degrees.get("ep", 1), expert_degrees(degrees)["exchange"]
    shapes = local_parameters(config, tp, head, ep_size=ep, vocab_multiple=vocab_multiple)
    stages = [_stage(config, shapes, stage, pp) for stage in range(pp)]
    cuts = _Cuts(dtype, frozen)
    parts: dict[tuple[int, int], dict[str, tuple[int, tuple[Slice, ...]]]] = {}
    tables: dict[tuple[int, int, int, int], Table] = {}
    layout = {}
    for rank, place in zip(ranks, coordinates(degrees), strict=True):
        shard = place["dp_shard"] * cp + place["cp"] if sharded else 0
        tp_rank, ep_rank = place["tp"], expert_place(degrees, place)["ep"]
        if (tp_rank, ep_rank) not in parts:
            found = all_slices(
                config,
                tp_rank,
                tp,
                head,
                ep_rank=ep_rank,
                ep_size=ep,
                vocab_multiple=vocab_multiple,
            )
            kinds = {name: (cuts.kind(shapes[name], held), held) for name, held in found.items()}
            parts[tp_rank, ep_rank] = kinds
        at = (place["pp"], tp_rank, ep_rank, shard)
        if at not in tables:
            # without shards, exchange has nothing to divide
            of_experts = (shard // exchange, max(1, num_shards // exchange))
            tables[at] = {
                name: cuts.shard(
                    kind, held, *(of_experts if is_expert_parameter(name) else (shard, num_shards))
                )
                for name, (kind, held) in parts[tp_rank, ep_rank].items()
                if name in stages[place["pp"]]
            }
        layout[rank] = tables[at]
    return layout


def _stage(config: ModelConfig, names: Iterable[str], stage: int, count: int) -> frozenset[str]:
    """The local names of a pipeline stage; the first stages have a layer more where need be."""
    size, more = divmod(config.num_layers, count)
    first = stage * size + min(stage, more)
    layers = range(first, first + size + (stage < more))
    held = {
        name for name in names if name.startswith("layers.") and int(name.split(".")[1]) in layers
    }
    if stage == 0 or (stage == count - 1 and config.tie_embeddings):
        held.add("embed_tokens.weight")
    if stage == count - 1:
        held.update(name for name in names if name.partition(".")[0] in ("norm", "head"))
    return frozenset(held)


class _Cuts:
    """FSDP's parts of local tensors. Layers are cut alike, so where is worked out once for all.

    Many ranks hold a million slices: they share all but their names.
    """

    def __init__(self, dtype: torch.dtype, frozen: Collection[str]) -> None:
        self._dtype, self._frozen = dtype, frozenset(frozen)
        self._kinds: dict[object, int] = {}
        self._tensors: list[tuple[tuple[int, ...], tuple[Slice, ...]]] = []
        """Of each kind: the shape and slices of its first tensor."""
        self._parts: dict[tuple[int, int, int], _Part] = {}

    def kind(self, shape: tuple[int, ...], slices: tuple[Slice, ...]) -> int:
        """A number for local tensors that differ in nothing but names."""
        alike = (shape, *((s.shape, s.start, s.stop, s.offset) for s in slices))
        kind = self._kinds.setdefault(alike, len(self._tensors))
        if kind == len(self._tensors):
            self._tensors.append((shape, slices))
        return kind

    def shard(self, kind: int, slices: tuple[Slice, ...], index: int, count: int) -> Held:
        """Shard `index` of `count` of the tensor with these slices."""
        at = (kind, index, count)
        if at not in self._parts:
            self._parts[at] = self._cut(*at)
        shape, pieces = self._parts[at]
        own = [
            Slice(
                name=slices[i].name,
                shape=piece.shape,
                start=piece.start,
                stop=piece.stop,
                offset=piece.offset,
            )
            for i, piece in pieces
        ]
        is_frozen = any(piece.name in self._frozen for piece in own)
        return Held(shape=shape, dtype=self._dtype, slices=tuple(own), frozen=is_frozen)

    def _cut(self, kind: int, index: int, count: int) -> _Part:
        shape, slices = self._tensors[kind]
        chunk = -(-shape[0] // count)
        first, last = min(index * chunk, shape[0]), min((index + 1) * chunk, shape[0])
        numbers = {piece.name: i for i, piece in enumerate(slices)}
        pieces = restrict(slices, first, last)
        return (last - first, *shape[1:]), [(numbers[piece.name], piece) for piece in pieces]


_Part = tuple[tuple[int, ...], list[tuple[int, Slice]]]
"""Shape, and slices with their place among those of the whole local tensor."""


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


def key(piece: Slice) -> Slice:
    """A slice apart from where it lies locally."""
    return piece if piece.offset == 0 else replace(piece, offset=0)
