"""Layouts of roles on DeepSpeed's ranks, as slices of the Hugging Face name space.

ZeRO 1 and 2 (https://arxiv.org/abs/1910.02054, section 5) hold the weights of a tensor-parallel
rank whole, and lay those that train below one another in one flat buffer for each of the
optimizer's groups; each rank updates an equal part of every buffer. ZeRO 3 cuts every parameter by
itself, also those that do not train, and each rank holds its part only. The rules are those of
deepspeed's `runtime/zero/stage_1_and_2.py`, `runtime/bf16_optimizer.py` (ZeRO 1 in bfloat16) and
`runtime/zero/partition_parameters.py`. All functions here are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from spmdrl.distributed.mesh import places_of
from spmdrl.models.adapters import Adapter, adapter_tensors
from spmdrl.models.config import ModelConfig
from spmdrl.models.flat_pieces import FlatPiece, flat_pieces
from spmdrl.models.local_shards import Kinds, KindTable, LocalShard, Table
from spmdrl.models.sharding import (
    SCORE,
    Head,
    all_slices,
    buffer_names,
    fused_tensors,
    local_parameters,
)
from spmdrl.models.tensors import Slice

Stage = Literal[1, 2, 3]

_ALIGNMENT = 2
"""Each rank's part of a flat buffer is a multiple of it: all-gathers start at 4 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroParameter:
    """One parameter of a tensor-parallel rank.

    Args:
        name: name as in `sharding`, or of an adapter's tensor.
        shape: its local shape, with one dim or two.
        trained: whether the optimizer has it.
        decay: whether weight decay applies, see `training.weights.make_leaves`.
        is_buffer: whether it is float32 everywhere and never trains.
    """

    name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    trained: bool
    decay: bool
    is_buffer: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRange:
    """The part of a parameter that a rank updates.

    Args:
        group: index of the optimizer's group.
        offset: place of the first value in the rank's flat part of the group.
        start, stop: range of the flattened parameter; equal if the rank has nothing of it.
    """

    group: int
    offset: int
    start: int
    stop: int


def zero_parameters(
    model: ModelConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    head: Head = "lm",
    frozen: Collection[str] = (),
    adapter: Adapter | None = None,
) -> tuple[ZeroParameter, ...]:
    """Return a tensor-parallel rank's parameters in the order that the backend gives its optimizer:
    a model's as in `sharding.fused_tensors` (a module may have another order), then an adapter's,
    then the scalar head that trains with one.

    Args:
        frozen: Hugging Face names of tensors that do not train.
        adapter: an adapter, which trains, and a scalar head with it, in place of the matrices.
    """
    table = fused_tensors(model, head)
    if adapter is not None:
        own = {n: t for n, t in table.items() if t[0].name == SCORE and SCORE not in frozen}
        base = {name: tensors for name, tensors in table.items() if name not in own}
        table = base | adapter_tensors(model, adapter) | own
    shapes = local_parameters(model, tp_size, table=table)
    slices = all_slices(model, tp_rank, tp_size, table=table)
    buffers = buffer_names(model)
    fixed = {*frozen, *buffers}
    return tuple(
        ZeroParameter(
            name=name,
            shape=shapes[name],
            slices=held,
            trained=not any(piece.name in fixed for piece in held),
            decay=len(shapes[name]) > 1 and not name.endswith("bias"),
            is_buffer=any(piece.name in buffers for piece in held),
        )
        for name, held in slices.items()
    )


def optimizer_groups(parameters: Sequence[ZeroParameter]) -> list[list[ZeroParameter]]:
    """Return the optimizer's groups: parameters with weight decay, then those without; a group of
    none is left out.
    """
    trained = [parameter for parameter in parameters if parameter.trained]
    groups = [[p for p in trained if p.decay is decay] for decay in (True, False)]
    return [group for group in groups if group]


def partition_sizes(
    parameters: Sequence[ZeroParameter], stage: Stage, num_shards: int
) -> tuple[int, ...]:
    """Return the number of values, with padding, in every rank's flat part of each group."""
    groups = optimizer_groups(parameters)
    if stage == 3:
        return tuple(sum(-(-p.numel // num_shards) for p in group) for group in groups)
    return tuple(_flat_size(sum(p.numel for p in group), num_shards) for group in groups)


def _flat_size(numel: int, num_shards: int) -> int:
    """Return the size of each part of a flat buffer that is padded to be divided evenly."""
    unit = _ALIGNMENT * num_shards
    return -(-numel // unit) * unit // num_shards


def shard_ranges(
    parameters: Sequence[ZeroParameter], stage: Stage, shard: int, num_shards: int
) -> dict[str, FlatRange]:
    """Return the part of every trained parameter that shard `shard` of `num_shards` updates."""
    found: dict[str, FlatRange] = {}
    for number, group in enumerate(optimizer_groups(parameters)):
        at = 0
        size = _flat_size(sum(p.numel for p in group), num_shards)
        first, last = shard * size, (shard + 1) * size
        for p in group:
            if stage == 3:
                start, stop = partition_range(p.numel, shard, num_shards)
                found[p.name] = FlatRange(group=number, offset=at, start=start, stop=stop)
                at += -(-p.numel // num_shards)
                continue
            start = min(max(first - at, 0), p.numel)
            stop = min(max(last - at, start), p.numel)
            offset = max(at - first, 0)
            found[p.name] = FlatRange(group=number, offset=offset, start=start, stop=stop)
            at += p.numel
    return found


def partition_range(numel: int, shard: int, num_shards: int) -> tuple[int, int]:
    """Return the values of a flattened parameter that shard `shard` holds under ZeRO 3; the last
    shards have fewer, or none.
    """
    size = -(-numel // num_shards)
    return min(shard * size, numel), min((shard + 1) * size, numel)


def named_pieces(
    parameter: ZeroParameter, start: int, stop: int
) -> Iterator[tuple[str, FlatPiece]]:
    """Yield the boxes of a range of a flattened parameter with their local names, which are equal
    on ranks with equally many.
    """
    if start < stop:
        for number, piece in enumerate(flat_pieces(parameter, start, stop)):
            yield f"{parameter.name}:{number}", piece


# The layouts of roles


def num_shards_of(degrees: Mapping[str, int]) -> int:
    """Return the number of ranks that ZeRO divides over: all with other rows or tokens."""
    return math.prod(degrees.get(axis, 1) for axis in ("dp_replicate", "dp_shard", "cp"))


def zero_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    stage: Stage,
    dtype: torch.dtype,
    head: Head = "lm",
    *,
    frozen: Collection[str] = (),
    adapter: Adapter | None = None,
    only: Collection[int] | None = None,
) -> dict[int, Table]:
    """Every rank's weights: the tensor-parallel part, whole or (ZeRO 3) in flat ranges, as boxes.

    Args:
        frozen: Hugging Face names of tensors that do not train.
        adapter: an adapter whose tensors the ranks hold as well.
        only: the ranks whose tables are made; None: all of them.
    """
    count = num_shards_of(degrees) if stage == 3 else 1
    made: dict[int, _Cutter] = {}

    def table(parameters: Sequence[ZeroParameter], shard: int) -> Table:
        if id(parameters) not in made:
            made[id(parameters)] = _Cutter(parameters, dtype, count)
        return made[id(parameters)].table(shard)

    return _rank_tables(
        model, ranks, degrees, count, table, head=head, frozen=frozen, adapter=adapter, only=only
    )


class _Cutter:
    """The parameters of a tensor-parallel rank by kinds, which are cut alike: layers are.

    Args:
        dtype: dtype of all but buffers.
        num_shards: 1 for whole parameters.
    """

    def __init__(
        self, parameters: Sequence[ZeroParameter], dtype: torch.dtype, num_shards: int
    ) -> None:
        self._dtype, self._num_shards = dtype, num_shards
        self._parameters: list[tuple[int, ZeroParameter]] = []
        """Each with the number of its kind."""
        self._firsts: list[ZeroParameter] = []
        """The first of each kind, with indices in place of its slices' names."""
        self._kinds: dict[tuple[int, ...], Kinds] = {}
        """Numbers of pieces of every kind -> local names, equal on all ranks that have as many."""
        numbers: dict[object, int] = {}
        for p in parameters:
            boxes = tuple((s.shape, s.start, s.stop, s.offset) for s in p.slices)
            number = numbers.setdefault((p.shape, p.trained, p.is_buffer, boxes), len(numbers))
            if number == len(self._firsts):
                slices = (replace(s, name=str(i)) for i, s in enumerate(p.slices))
                self._firsts.append(replace(p, slices=tuple(slices)))
            self._parameters.append((number, p))

    def table(self, shard: int) -> KindTable:
        """Return the tensors of a rank that has this shard of every parameter."""
        cuts = [list(self._cut(first, shard)) for first in self._firsts]
        shards: dict[Hashable, LocalShard] = {
            (kind, i): LocalShard(
                shape=shape,
                dtype=torch.float32 if self._firsts[kind].is_buffer else self._dtype,
                slices=slices,
                frozen=not self._firsts[kind].trained,
            )
            for kind, pieces in enumerate(cuts)
            for i, (_, shape, slices) in enumerate(pieces)
        }
        counts = tuple(map(len, cuts))
        if counts not in self._kinds:
            self._kinds[counts] = {
                f"{p.name}{suffix}": ((kind, i), tuple(s.name for s in p.slices))
                for kind, p in self._parameters
                for i, (suffix, _, _) in enumerate(cuts[kind])
            }
        return KindTable(self._kinds[counts], shards)

    def _cut(
        self, first: ZeroParameter, shard: int
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[Slice, ...]]]:
        """Yield what follows a parameter's name in that of each tensor, its shape and slices."""
        if self._num_shards == 1:
            yield "", first.shape, first.slices
            return
        start, stop = partition_range(first.numel, shard, self._num_shards)
        for name, piece in named_pieces(first, start, stop):
            yield name.removeprefix(first.name), piece.shape, piece.slices


def zero_state_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    stage: Stage,
    head: Head = "lm",
    *,
    frozen: Collection[str] = (),
    adapter: Adapter | None = None,
    only: Collection[int] | None = None,
) -> dict[int, Table]:
    """Every rank's part of the float32 masters, and so of each moment: flat ranges, as boxes.

    Args:
        frozen, adapter, only: see `zero_layout`.
    """
    count = num_shards_of(degrees)

    def table(parameters: Sequence[ZeroParameter], shard: int) -> Table:
        ranges = shard_ranges(parameters, stage, shard, count)
        return {
            name: LocalShard(shape=piece.shape, dtype=torch.float32, slices=piece.slices)
            for p in parameters
            if p.trained
            for name, piece in named_pieces(p, ranges[p.name].start, ranges[p.name].stop)
        }

    return _rank_tables(
        model, ranks, degrees, count, table, head=head, frozen=frozen, adapter=adapter, only=only
    )


def _rank_tables(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    num_shards: int,
    table: Callable[[Sequence[ZeroParameter], int], Table],
    *,
    head: Head,
    frozen: Collection[str],
    adapter: Adapter | None,
    only: Collection[int] | None,
) -> dict[int, Table]:
    """Ranks with the same tp and shard coordinates share one table."""
    tp, cp = degrees.get("tp", 1), degrees.get("cp", 1)
    parameters: dict[int, tuple[ZeroParameter, ...]] = {}
    tables: dict[tuple[int, int], Table] = {}
    layout = {}
    for rank, place in places_of(ranks, degrees, only):
        at = place["dp_replicate"] * degrees.get("dp_shard", 1) + place["dp_shard"]
        shard, tp_rank = (at * cp + place["cp"]) % num_shards, place["tp"]
        if tp_rank not in parameters:
            parameters[tp_rank] = zero_parameters(
                model, tp_rank=tp_rank, tp_size=tp, head=head, frozen=frozen, adapter=adapter
            )
        if (tp_rank, shard) not in tables:
            tables[tp_rank, shard] = table(parameters[tp_rank], shard)
        layout[rank] = tables[tp_rank, shard]
    return layout
