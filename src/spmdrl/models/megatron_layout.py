"""Layouts of roles on Megatron ranks, as slices of the Hugging Face name space, by kinds of layers.

The optimizer's state is a flat range of a buffer of all parameters that train, see
`megatron_buffers`. All functions here are pure, and depend on Megatron only by the way it cuts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from spmdrl.distributed.mesh import expert_degrees, expert_place, places_of
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.flat_pieces import FlatPiece, flat_pieces
from spmdrl.models.local_shards import KindTable, LaterKinds, LocalShard, NamedKind, Table
from spmdrl.models.megatron_buffers import HeldPart, held_parts
from spmdrl.models.megatron_chunks import Cut, Part, adapter_chunks, rank_parts, whole_part
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

    def table(place: Mapping[str, int], shard: int) -> Table:
        if adapter is None:
            chunks = _base_parts(model, degrees, cut, place, head)
        else:
            added = adapter_chunks(model, cut, place["tp"], place["pp"], adapter, head)
            chunks = [(whole_part(rows),) for rows in added if rows]
        held = [one for parts in chunks for one in held_parts(parts, shard, num_shards, exchange)]
        return states_table(held)

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
    fixed = [_frozen_rows(part, frozen) for part in parts]
    listed = list(zip(parts, fixed, strict=True))
    layers = Counter((_kind_of(part), found) for part, found in listed)
    shards: dict[Hashable, LocalShard] = {}
    counts: Counter[Hashable] = Counter()
    for part, found in {(_kind_of(part), found): (part, found) for part, found in listed}.values():
        for number, kind in enumerate(part.kinds):
            at = (_kind_of(part), kind, number in found)
            counts[at] += layers[_kind_of(part), found]
            if at not in shards:
                row = part.rows[number]
                shards[at] = LocalShard(
                    shape=row.shape,
                    dtype=dtype,
                    slices=_numbered(row.slices),
                    frozen=number in found,
                )

    def names() -> Iterator[NamedKind]:
        for part, found in listed:
            for number, row in enumerate(part.rows):
                at = (_kind_of(part), part.kinds[number], number in found)
                yield part.renamed(row.name), (at, tuple(part.renamed(s.name) for s in row.slices))

    return KindTable(LaterKinds(names, counts, _key_of(listed)), shards)


def _key_of(listed: Sequence[tuple[Part, frozenset[int]]]) -> Hashable:
    """Key of the names in these parts and of their kinds."""
    rows = {
        _kind_of(part): (part.kinds, tuple(row.name for row in part.rows)) for part, _ in listed
    }
    layers = tuple((_kind_of(part), part.layer, found) for part, found in listed)
    return layers, tuple(rows.items())


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


def states_table(held: Sequence[HeldPart]) -> KindTable:
    """Make the table of a rank's masters: flat ranges of rows, as boxes."""
    alike = Counter((_kind_of(one.part), one.whole) for one in held if not one.ranges)
    whole = {(_kind_of(one.part), one.whole): one for one in held if not one.ranges}
    shards: dict[Hashable, LocalShard] = {}
    counts: Counter[Hashable] = Counter()
    for one, times in (
        *((whole[at], times) for at, times in alike.items()),
        *((one, 1) for one in held if one.ranges),
    ):
        for number in range(len(one.part.rows)):
            for at, piece in _pieces(one, number):
                counts[at] += times
                if at not in shards:
                    shards[at] = LocalShard(
                        shape=piece.shape, dtype=torch.float32, slices=piece.slices
                    )

    def names() -> Iterator[NamedKind]:
        for one in held:
            part = one.part
            for number, row in enumerate(part.rows):
                own = tuple(part.renamed(s.name) for s in row.slices)
                for at, piece in _pieces(one, number):
                    yield f"{part.renamed(row.name)}:{piece.start}", (at, own)

    return KindTable(LaterKinds(names, counts, object()), shards)


def _pieces(one: HeldPart, number: int) -> Iterator[tuple[Hashable, FlatPiece]]:
    """Yield the boxes of a row that a shard has, each with its kind."""
    part, (start, stop) = one.part, one.range_of(number)
    row = part.rows[number]
    if start == stop:
        return
    is_whole = (start, stop) == (0, math.prod(row.shape))
    kind = (_kind_of(part), part.kinds[number]) if is_whole else part.renamed(row.name)
    for piece in flat_pieces(replace(row, slices=_numbered(row.slices)), start, stop):
        yield (kind, piece.start), piece


def _numbered(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """Slices with their indices in place of their names."""
    return tuple(replace(piece, name=str(i)) for i, piece in enumerate(slices))
