"""Owners of slices: one rank writes each slice of a layout, and holders write about as many values.

Layers are alike: a layout of a hundred thousand slices has some thousands that differ in more than
their names, and only those are compared.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from spmdrl.checkpoint.index import Tensors
from spmdrl.models.local_shards import Kinds, Table, WeightLayout
from spmdrl.models.tensors import Slice
from spmdrl.weights.layout import key, kinds_of, shards_by_kind


@dataclass(frozen=True)
class _Alike:
    """Ranks at equal places, which share one table: thousands of ranks have hundreds of tables."""

    table: Table
    kinds: Kinds
    ranks: list[int] = field(default_factory=list)


def owned_slices(layout: WeightLayout, rank: int) -> frozenset[Slice]:
    """The slices of a layout (apart from their local places) that `rank` writes.

    A pure function, so that ranks need no messages: each distinct slice has one owner. Slices that
    only one rank holds come first, then larger ones first; each goes to its holder with the fewest
    values so far.
    """
    loads = [0] * (max(layout, default=-1) + 1)
    owned: list[Slice] = []
    for piece, names, ranks in _by_size(layout):
        if len(ranks) == 1:
            loads[ranks[0]] += piece.numel * len(names)
            owners = ranks * len(names)
        else:
            owners = _deal(loads, ranks, piece.numel, len(names))
        owned += [
            replace(piece, name=name)
            for name, owner in zip(names, owners, strict=True)
            if owner == rank
        ]
    return frozenset(owned)


def frozen_slices(table: Table) -> frozenset[Slice]:
    """The slices of a rank's table (apart from their local places) that have no optimizer state."""
    return frozenset(
        key(piece)
        for held, names in shards_by_kind(table)
        if held.frozen
        for name in names
        for piece in table[name].slices
    )


def only(tensors: Tensors, owned: Set[Slice], frozen: Set[Slice] = frozenset()) -> Tensors:
    """The tensors, each with those of its slices that are in `owned`.

    Each group of tensors must contain all of `owned`, or the checkpoint would lack some of it;
    `frozen` slices are required only of the weights.
    """
    kept = {
        name: (tensor, tuple(piece for piece in slices if key(piece) in owned))
        for name, (tensor, slices) in tensors.items()
    }
    found: dict[str, set[Slice]] = {}
    for name, (_, slices) in kept.items():
        found.setdefault(name.split("/", 1)[0], set()).update(map(key, slices))
    for group, here in found.items():
        needed = owned if group == "weights" else owned - frozen
        assert here == needed, (group, needed - here)
    return kept


def _deal(loads: list[int], ranks: Sequence[int], numel: int, count: int) -> list[int]:
    """Owners of `count` slices of `numel` values, each the rank with the least load so far, the
    first of equals; adds them to `loads`.
    """
    bits = len(ranks).bit_length()
    mask = (1 << bits) - 1
    # (load, place among the ranks) as one number
    heap = [(loads[rank] << bits) + i for i, rank in enumerate(ranks)]
    heapq.heapify(heap)
    more = numel << bits
    owners = [ranks[heapq.heapreplace(heap, heap[0] + more) & mask] for _ in range(count)]
    for found in heap:
        loads[ranks[found & mask]] = found >> bits
    return owners


def _by_size(layout: WeightLayout) -> list[tuple[Slice, list[str], list[int]]]:
    """Slices with the names of all that are held alike, its own among them, and their holders;
    those with one holder come first, then larger ones.
    """
    tables: dict[int, _Alike] = {}
    for rank in sorted(layout):
        table = layout[rank]
        if id(table) not in tables:
            tables[id(table)] = _Alike(table, kinds_of(table))
        tables[id(table)].ranks.append(rank)
    classes = list(tables.values())
    names = _names_alike(classes)
    holders: dict[Slice, list[int]] = {}
    for number, piece in _first_slices(classes, names):
        found = holders.setdefault(piece, [])
        if number not in found[-1:]:
            found.append(number)
    ranks_of = {
        numbers: sorted(rank for number in numbers for rank in classes[number].ranks)
        for numbers in set(map(tuple, holders.values()))
    }
    slices = [(piece, names[piece.name], ranks_of[tuple(held)]) for piece, held in holders.items()]
    slices.sort(key=lambda one: (len(one[2]) > 1, -one[0].numel))
    return slices


def _names_alike(classes: Iterable[_Alike]) -> dict[str, list[str]]:
    """Global tensors by the first of those that all ranks hold in the same places of tensors of the
    same kinds.
    """
    places: dict[str, list[tuple[int, Hashable, int]]] = {}
    for number, kinds in enumerate({id(one.kinds): one.kinds for one in classes}.values()):
        for kind, names in kinds.values():
            for i, name in enumerate(names):
                places.setdefault(name, []).append((number, kind, i))
    alike: dict[object, list[str]] = {}
    for name, found in places.items():
        alike.setdefault(tuple(found), []).append(name)
    return {names[0]: names for names in alike.values()}


def _first_slices(
    classes: Sequence[_Alike], firsts: Mapping[str, object]
) -> Iterator[tuple[int, Slice]]:
    """Slices of the tensors `firsts` with the number of the class that holds them."""
    wanted: dict[int, list[str]] = {}
    for number, one in enumerate(classes):
        if id(one.kinds) not in wanted:
            wanted[id(one.kinds)] = [
                local
                for local, (_, names) in one.kinds.items()
                if not firsts.keys().isdisjoint(names)
            ]
        for local in wanted[id(one.kinds)]:
            for piece in one.table[local].slices:
                if piece.name in firsts:
                    yield number, key(piece)
