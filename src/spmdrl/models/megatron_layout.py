"""Layouts of roles on Megatron ranks, as slices of the Hugging Face name space, by kinds of layers.

The optimizer's state is a flat range of a buffer of all parameters that train, see
`megatron_buffers`. All functions here are pure, and depend on Megatron only by the way it cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from spmdrl.distributed.mesh import expert_degrees, expert_place, places_of
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.flat_pieces import flat_pieces
from spmdrl.models.local_shards import (
    KindPart,
    KindTable,
    LayerKinds,
    LocalShard,
    NamedKind,
    Table,
)
from spmdrl.models.megatron_buffers import HeldPart, held_parts
from spmdrl.models.megatron_chunks import (
    Cut,
    Parameter,
    Part,
    adapter_chunks,
    rank_parts,
    whole_part,
)
from spmdrl.models.sharding import Head
from spmdrl.models.tensors import Slice


def megatron_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    dtype: torch.dtype,
    head: Head = "lm",
    *,
    frozen: Collection[str] = (),
    adapter: Adapter | None = None,
    only: Collection[int] | None = None,
) -> dict[int, Table]:
    """Every rank's weights: the tensor-parallel part of its pipeline stage.

    Args:
        frozen: Hugging Face names of tensors that do not train.
        adapter: an adapter whose tensors the ranks hold as well.
        only: the ranks whose tables are made; None: all of them.
    """

    def table(place: Mapping[str, int], shard: int) -> Table:
        chunks = _base_parts(model, degrees, cut, place, head)
        if adapter is not None:
            added = adapter_chunks(model, cut, place["tp"], place["pp"], adapter)
            chunks = [*chunks, *[(whole_part(rows),) for rows in added if rows]]
        return weights_table([part for parts in chunks for part in parts], dtype, frozen)

    return _rank_tables(ranks, degrees, 1, table, only)


def megatron_state_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    head: Head = "lm",
    *,
    adapter: Adapter | None = None,
    only: Collection[int] | None = None,
) -> dict[int, Table]:
    """Every rank's part of the masters, and so of each moment: flat ranges, as boxes.

    Args:
        adapter: an adapter that trains, and a scalar head with it, in place of the matrices.
        only: the ranks whose tables are made; None: all of them.
    """
    num_shards = degrees["dp_shard"] * degrees["cp"]
    exchange = expert_degrees(degrees)["exchange"]
    states = StateTables()

    def table(place: Mapping[str, int], shard: int) -> Table:
        if adapter is None:
            chunks = _base_parts(model, degrees, cut, place, head)
        else:
            added = adapter_chunks(model, cut, place["tp"], place["pp"], adapter, head)
            chunks = [(whole_part(rows),) for rows in added if rows]
        held = [one for parts in chunks for one in held_parts(parts, shard, num_shards, exchange)]
        return states.table(held)

    return _rank_tables(ranks, degrees, num_shards, table, only)


def _base_parts(
    model: ModelConfig,
    degrees: Mapping[str, int],
    cut: Cut,
    place: Mapping[str, int],
    head: Head,
) -> list[tuple[Part, ...]]:
    ep_rank = expert_place(degrees, place)["ep"]
    return _parts(model, cut, place["tp"], place["pp"], head, ep_rank=ep_rank)


# a role's weights and its state are cut from the same parts, and ranks that differ in shards alone
# have the same
_parts = lru_cache(maxsize=64)(rank_parts)


def _rank_tables(
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    num_shards: int,
    table: Callable[[Mapping[str, int], int], Table],
    only: Collection[int] | None,
) -> dict[int, Table]:
    """Ranks with the same pp, tp, ep and shard coordinates share one table."""
    tables: dict[tuple[int, int, int, int], Table] = {}
    layout = {}
    for rank, place in places_of(ranks, degrees, only):
        shard = (place["dp_shard"] * degrees["cp"] + place["cp"]) % num_shards
        at = (place["pp"], place["tp"], expert_place(degrees, place)["ep"], shard)
        if at not in tables:
            tables[at] = table(place, shard)
        layout[rank] = tables[at]
    return layout


def weights_table(parts: Sequence[Part], dtype: torch.dtype, frozen: Collection[str]) -> KindTable:
    """Make the table of a rank's weights.

    Args:
        frozen: see `megatron_layout`.
    """
    shards: dict[Hashable, LocalShard] = {}
    rows: dict[Hashable, tuple[NamedKind, ...]] = {}
    found = []
    for part in parts:
        fixed = _frozen_rows(part, frozen)
        at = (_kind_of(part), fixed)
        if at not in rows:
            own = []
            for number, row in enumerate(part.rows):
                is_fixed = number in fixed
                kind = (_kind_of(part), part.kinds[number], is_fixed)
                own.append((row.name, (kind, _names(row.slices))))
                if kind not in shards:
                    slices = _numbered(row.slices)
                    shards[kind] = LocalShard(
                        shape=row.shape, dtype=dtype, slices=slices, frozen=is_fixed
                    )
            rows[at] = tuple(own)
        found.append(KindPart(rows=rows[at], layer=part.layer, first=part.first))
    return KindTable(LayerKinds(found), shards)


def _kind_of(part: Part) -> Hashable:
    """Key of the parts that have the same rows."""
    return part.rows[0].name if part.layer is None else part.first


def _frozen_rows(part: Part, frozen: Collection[str]) -> frozenset[int]:
    """The numbers of the rows that do not train."""
    if not frozen:
        return frozenset()
    return frozenset(
        number
        for number, row in enumerate(part.rows)
        if any(part.renamed(piece.name) in frozen for piece in row.slices)
    )


class StateTables:
    """Tables of masters: flat ranges of rows, as boxes; whole rows are made once for all shards."""

    def __init__(self) -> None:
        self._whole: dict[tuple[int, int], tuple[NamedKind, LocalShard]] = {}
        self._rows: dict[int, tuple[Parameter, ...]] = {}
        """Rows by their ids, which no others get as long as they are kept."""

    def table(self, held: Sequence[HeldPart]) -> KindTable:
        """Make the table of a rank that holds these."""
        shards: dict[Hashable, LocalShard] = {}
        rows: dict[Hashable, tuple[NamedKind, ...]] = {}
        found = []
        for one in held:
            part = one.part
            # a layer that the rank has a part of is like no other one
            at = (_kind_of(part), one.whole, part.layer if one.ranges else None)
            if at not in rows:
                made = [piece for i in range(len(part.rows)) for piece in self._pieces(one, i)]
                shards |= {kind: shard for (_, (kind, _)), shard in made}
                rows[at] = tuple(named for named, _ in made)
            found.append(KindPart(rows=rows[at], layer=part.layer, first=part.first))
        return KindTable(LayerKinds(found), shards)

    def _pieces(self, one: HeldPart, number: int) -> list[tuple[NamedKind, LocalShard]]:
        """The boxes of a row that a shard has."""
        part, (start, stop) = one.part, one.range_of(number)
        row = part.rows[number]
        if start == stop:
            return []
        if (start, stop) != (0, math.prod(row.shape)):
            return list(_state_pieces(row, start, stop, (_kind_of(part), (number, part.layer))))
        at = (id(part.rows), number)
        if at not in self._whole:
            self._rows[id(part.rows)] = part.rows
            alike = part.rows[part.kinds[number]].name
            [self._whole[at]] = _state_pieces(row, start, stop, (_kind_of(part), alike))
        return [self._whole[at]]


def _state_pieces(
    row: Parameter, start: int, stop: int, kind: tuple[Hashable, Hashable]
) -> Iterator[tuple[NamedKind, LocalShard]]:
    """Yield the boxes of a range of a row."""
    for piece in flat_pieces(replace(row, slices=_numbered(row.slices)), start, stop):
        shard = LocalShard(shape=piece.shape, dtype=torch.float32, slices=piece.slices)
        yield (f"{row.name}:{piece.start}", ((*kind, piece.start), _names(row.slices))), shard


def _names(slices: Iterable[Slice]) -> tuple[str, ...]:
    return tuple(piece.name for piece in slices)


def _numbered(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """Slices with their indices in place of their names."""
    return tuple(replace(piece, name=str(i)) for i, piece in enumerate(slices))
