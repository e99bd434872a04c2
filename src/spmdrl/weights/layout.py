"""The layout of a role: every rank's shards of a model, by kinds, since layers are alike."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from spmdrl.distributed.mesh import expert_degrees, expert_place, places_of
from spmdrl.models.adapters import Adapter, adapter_tensors
from spmdrl.models.config import ModelConfig
from spmdrl.models.fsdp_cuts import fsdp_dims, fsdp_shard
from spmdrl.models.local_shards import (
    KindPart,
    Kinds,
    KindTable,
    LayerKinds,
    LocalShard,
    NamedKind,
    Table,
    WeightLayout,
)
from spmdrl.models.sharding import (
    Head,
    all_slices,
    buffer_names,
    fused_tensors,
    local_parameters,
)
from spmdrl.models.tensors import Slice, TensorTable, is_expert_parameter, layer_of
from spmdrl.models.widths import first_alike


def kinds_of(table: Table) -> Kinds:
    """The table's own kinds, all listed, or one for each tensor."""
    if isinstance(table, KindTable):
        return table.kinds.listed if isinstance(table.kinds, LayerKinds) else table.kinds
    return {name: (name, _names(held.slices)) for name, held in table.items()}


def shards_by_kind(table: Table) -> Iterator[tuple[LocalShard, Sequence[str]]]:
    """The first tensor of each kind, with the local names of all."""
    names: dict[Hashable, list[str]] = {}
    for local_name, (kind, _) in kinds_of(table).items():
        names.setdefault(kind, []).append(local_name)
    for alike in names.values():
        yield table[alike[0]], alike


def trained_layout(layout: WeightLayout) -> dict[int, Table]:
    """The layout without frozen tensors; ranks that shared a table or kinds share them again."""
    tables: dict[int, Table] = {}
    kept: dict[tuple[int, frozenset[Hashable]], Kinds] = {}
    for table in layout.values():
        if id(table) in tables:
            continue
        if not isinstance(table, KindTable):
            tables[id(table)] = {name: held for name, held in table.items() if not held.frozen}
            continue
        frozen = frozenset(kind for kind, shard in table.shards.items() if shard.frozen)
        at = (id(table.kinds), frozen)
        if at not in kept:
            kept[at] = {n: one for n, one in kinds_of(table).items() if one[0] not in frozen}
        tables[id(table)] = KindTable(kept[at], table.shards)
    return {rank: tables[id(table)] for rank, table in layout.items()}


def model_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    dtype: torch.dtype,
    head: Head = "lm",
    frozen: Collection[str] = (),
    vocab_multiple: int = 1,
    blocks: int = 1,
    shard_dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
    only: Collection[int] | None = None,
) -> dict[int, Table]:
    """The layout of a role: tensor-parallel parameters, cut by FSDP if dp_shard > 1.

    FSDP2 shards over dp_shard x cp (see `models.fsdp_cuts`). Experts are sharded over those of
    these ranks that hold the same ones (see `distributed.mesh`). Pipeline stages hold
    consecutive layers; the first has the embedding, the last the norm and the head (or, if they are
    tied, the embedding again). Ranks with the same pp, tp, ep and shard place share one table.

    Args:
        frozen: Hugging Face names of parameters that do not train; the model's buffers never do.
        vocab_multiple: the vocabulary's rows are padded to a multiple of it.
        blocks: see `models.sharding.all_slices`.
        shard_dtype: dtype of those tensors that FSDP cuts and that train, by default `dtype`.
        adapter: an adapter whose tensors the ranks hold as well.
        only: the ranks whose tables are made; None: all of them.
    """
    tp, cp, pp = degrees.get("tp", 1), degrees.get("cp", 1), degrees.get("pp", 1)
    sharded = degrees.get("dp_shard", 1) > 1
    num_shards = degrees.get("dp_shard", 1) * cp if sharded else 1
    ep, exchange = degrees.get("ep", 1), expert_degrees(degrees)["exchange"]
    added = {} if adapter is None else adapter_tensors(model, adapter)
    firsts = _first_alike(model, head, frozen)
    fused = _of_layers(fused_tensors(model, head), firsts)
    table = {**fused, **added}
    cut: dict[str, Any] = {"vocab_multiple": vocab_multiple, "table": table}
    shapes = local_parameters(model, tp, ep_size=ep, **cut)
    dims = fsdp_dims(model, head, blocks) | dict.fromkeys(added)
    dtypes = {"dtype": dtype, "shard_dtype": (shard_dtype or dtype) if sharded else dtype}
    tables_of = _KindTables(**dtypes, frozen=frozen, buffers=buffer_names(model), dims=dims)
    slices_at = partial(all_slices, model, tp_size=tp, ep_size=ep, blocks=blocks, **cut)
    whole: dict[tuple[int, int], Kinds] = {}
    by_place: dict[tuple[int, int, int], LayerKinds] = {}
    tables: dict[tuple[int, int, int, int], Table] = {}
    layout = {}
    for rank, place in places_of(ranks, degrees, only):
        shard = place["dp_shard"] * cp + place["cp"] if sharded else 0
        at = (place["pp"], place["tp"], expert_place(degrees, place)["ep"])
        if at[1:] not in whole:
            whole[at[1:]] = tables_of.name_all(shapes, slices_at(tp_rank=at[1], ep_rank=at[2]))
        if at not in by_place:
            by_place[at] = _stage_kinds(model, whole[at[1:]], firsts, fused, (at[0], pp))
        if (*at, shard) not in tables:
            # without shards, exchange has nothing to divide
            of_experts = (shard // exchange, max(1, num_shards // exchange))
            tables[*at, shard] = tables_of.table(by_place[at], (shard, num_shards), of_experts)
        layout[rank] = tables[*at, shard]
    return layout


def _of_layers(table: TensorTable, layers: Collection[int]) -> TensorTable:
    """The tensors of these layers, and those of none."""
    chosen = {None, *layers}
    return {name: tensors for name, tensors in table.items() if layer_of(name) in chosen}


def _first_alike(model: ModelConfig, head: Head, frozen: Collection[str]) -> tuple[int, ...]:
    """Layers that differ from each layer in names of tensors only, the first one for each."""
    firsts = first_alike(model)
    if not frozen:
        return firsts
    fixed: dict[int, list[bool]] = {layer: [] for layer in range(model.num_layers)}
    for name, tensors in fused_tensors(model, head).items():
        if (layer := layer_of(name)) is not None:
            fixed[layer] += [tensor.name in frozen for tensor in tensors]
    found: dict[object, int] = {}
    return tuple(
        found.setdefault((first, *fixed[layer]), layer) for layer, first in enumerate(firsts)
    )


def _stage_kinds(
    model: ModelConfig,
    whole: Kinds,
    firsts: Sequence[int],
    fused: Collection[str],
    stage: tuple[int, int],
) -> LayerKinds:
    """The kinds of a pipeline stage; the first stages take the layers left by division.

    Args:
        whole: those of the whole model, with one of each kind of layers.
        firsts: see `_first_alike`.
        fused: local names of the model's own parameters in `whole`.
        stage: the stage's index, and the number of stages.
    """
    index, count = stage
    size, more = divmod(model.num_layers, count)
    start = index * size + min(index, more)
    layers = range(start, start + size + (index < more))
    rows: dict[int, list[NamedKind]] = {}
    before, after = [], []
    for name, named in whole.items():
        layer = layer_of(name)
        if layer is not None and name in fused:
            rows.setdefault(layer, []).append((name, named))
        elif name == "embed_tokens.weight":
            if index == 0 or (model.tie_embeddings and index == count - 1):
                before.append((name, named))
        elif index == count - 1 if layer is None else layer in layers:
            after.append((name, named))
    distinct = {layer: tuple(held) for layer, held in rows.items()}
    return LayerKinds(
        [
            KindPart(rows=tuple(before)),
            *[KindPart(rows=distinct[firsts[i]], layer=i, first=firsts[i]) for i in layers],
            KindPart(rows=tuple(after)),
        ]
    )


@dataclass(frozen=True)
class _Kind:
    """Local tensors that differ only in names.

    Args:
        shape, slices: those of the first of them, whole.
        dim: dim along which FSDP cuts them, or None.
        has_experts: FSDP cuts them over the ranks with the same experts.
        is_buffer: they are float32 everywhere.
    """

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    dim: int | None
    has_experts: bool
    is_buffer: bool


class _KindTables:
    """The kinds of a model's tensor-parallel parameters, and FSDP's shards of them."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        shard_dtype: torch.dtype,
        frozen: Collection[str],
        buffers: Collection[str],
        dims: Mapping[str, int | None],
    ) -> None:
        self._dtype, self._shard_dtype = dtype, shard_dtype
        self._frozen, self._buffers = frozenset((*frozen, *buffers)), frozenset(buffers)
        self._dims = dims
        self._numbers: dict[object, int] = {}
        self._kinds: list[_Kind] = []
        self._shards: dict[tuple[int, int, int], LocalShard] = {}

    def name_all(
        self, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[Slice, ...]]
    ) -> Kinds:
        """The kinds of whole tensor-parallel parameters, those of one layer of each kind."""
        return {
            local_name: (self._kind(local_name, shapes[local_name], held), _names(held))
            for local_name, held in found.items()
        }

    def table(
        self, kinds: LayerKinds, of_others: tuple[int, int], of_experts: tuple[int, int]
    ) -> KindTable:
        """The tensors of a rank whose FSDP shards are these (number, count)."""
        shards: dict[Hashable, LocalShard] = {}
        for kind in kinds.counts:
            assert isinstance(kind, int)
            place = of_experts if self._kinds[kind].has_experts else of_others
            shards[kind] = self._shard(kind, *place)
        return KindTable(kinds, shards)

    def _kind(self, local_name: str, shape: tuple[int, ...], slices: tuple[Slice, ...]) -> int:
        kind = _Kind(
            shape,
            slices,
            self._dims[local_name],
            is_expert_parameter(local_name),
            any(s.name in self._buffers for s in slices),
        )
        boxes = ((s.shape, s.start, s.stop, s.offset, s.name in self._frozen) for s in slices)
        alike = (shape, kind.dim, kind.has_experts, kind.is_buffer, *boxes)
        number = self._numbers.setdefault(alike, len(self._kinds))
        if number == len(self._kinds):
            self._kinds.append(kind)
        return number

    def _shard(self, number: int, index: int, count: int) -> LocalShard:
        """Shard `index` of `count`."""
        at = (number, index, count)
        if at not in self._shards:
            kind = self._kinds[number]
            # their indices instead of their names: a name can occur several times
            slices = tuple(replace(s, name=str(i)) for i, s in enumerate(kind.slices))
            shape, own = fsdp_shard(kind.shape, slices, kind.dim, index, count)
            frozen = any(piece.name in self._frozen for piece in kind.slices)
            dtype = self._dtype if kind.dim is None or frozen else self._shard_dtype
            self._shards[at] = LocalShard(
                shape=shape,
                dtype=torch.float32 if kind.is_buffer else dtype,
                slices=own,
                frozen=frozen,
            )
        return self._shards[at]


def _names(slices: Iterable[Slice]) -> tuple[str, ...]:
    return tuple(piece.name for piece in slices)


def overlap(a: Slice, b: Slice) -> tuple[tuple[int, int], ...] | None:
    """The global ranges that two slices of one tensor share, or None if there are none."""
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
    """A slice without its local place (offset 0), for comparisons."""
    return piece if piece.offset == 0 else replace(piece, offset=0)
