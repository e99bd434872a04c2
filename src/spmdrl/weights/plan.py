"""`SyncPlan`: the moves between two layouts, a pure function of them, equal on every rank.

    shared     one tensor at source and target: nothing moves
    cells      boxes of the other tensors, with the ranks that hold and want them (`cells`)
    routes     delivery of a cell to the ranks that lack it (`routes`)
    rounds     cells in the target's order, so many that no rank stages more than a slot

`rank_rounds` derives one rank's part of it, which `sync.WeightSync` executes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from spmdrl.models.local_shards import (
    Kinds,
    KindTable,
    LayerKinds,
    Table,
    WeightLayout,
    counted,
    named_bytes,
)
from spmdrl.models.tensors import in_layer
from spmdrl.weights.cells import Cell, Pattern, Patterns, find_cuts
from spmdrl.weights.layout import kinds_of, shards_by_kind
from spmdrl.weights.rounds import CellRange, Round, make_rounds
from spmdrl.weights.routes import Ranks, Route

DEFAULT_BUCKET = 256 * 2**20
NUM_SLOTS = 3
"""Rounds in flight: one sends, one broadcasts, one arrives; together they stage two buckets."""

_CELLS_PER_SLOT = 8

WORTH_SHARING = 0.5
"""Share of a rank's source bytes that the target must be able to use in place, to share at all:
a rank that shares one tensor keeps all of the source's on the device while it computes.
"""


@dataclass(frozen=True, kw_only=True)
class SyncPlan:
    """The moves that `WeightSync` makes.

    Args:
        shared: rank -> local names whose target tensor is the source's own storage.
        patterns: distinct lists of cells with their routes' numbers.
        routes: see `Route`.
        groups: ranks that broadcast among themselves.
        rounds: moves of every sync, in the target's order.
        frozen_rounds: moves of frozen tensors, which syncs after the first can omit.
        slot_bytes: most bytes that a rank stages in a round.
        world_size: one more than the highest rank.
        shared_bytes, copied_bytes, gathered_bytes: over all target ranks, in the target's dtype:
            used in place, copied on the rank itself, needed from another rank (the lower bound of
            what must move).
        moved_bytes: bytes over all receivers, in the dtypes that travel.
    """

    shared: Mapping[int, frozenset[str]]
    patterns: tuple[Pattern, ...]
    routes: tuple[Route, ...]
    groups: tuple[Ranks, ...]
    rounds: tuple[Round, ...]
    frozen_rounds: tuple[Round, ...]
    slot_bytes: int
    world_size: int
    shared_bytes: int
    copied_bytes: int
    gathered_bytes: int
    moved_bytes: int

    @property
    def moves(self) -> bool:
        """Whether a sync after the first moves anything."""
        return bool(self.rounds)

    @cached_property
    def changing(self) -> frozenset[str]:
        """Names of the global tensors that every sync moves to a rank that does not share them."""
        return frozenset(cells.name for one in self.rounds for cells in one)

    @cached_property
    def moved_again_bytes(self) -> int:
        """`moved_bytes` of a sync that omits frozen tensors."""
        if not self.frozen_rounds:
            return self.moved_bytes
        cells = self.cells(frozen=False)
        return sum(cell.num_bytes * route.num_receivers for _, cell, route in cells)

    @cached_property
    def digest(self) -> str:
        """Hash of the plan: equal plans have equal digests."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, object]:
        """The plan as plain values, for files and comparisons."""
        return {
            "shared": {str(rank): sorted(names) for rank, names in self.shared.items()},
            "patterns": [
                [[c.start, c.stop, str(c.dtype), c.holders, c.wanting, route] for c, route in cells]
                for cells in self.patterns
            ],
            "routes": [[r.copies, r.sends, r.casts] for r in self.routes],
            "groups": self.groups,
            "rounds": [[_as_list(cells) for cells in one] for one in self.rounds],
            "frozen_rounds": [[_as_list(cells) for cells in one] for one in self.frozen_rounds],
            "bytes": [
                *(self.slot_bytes, self.world_size, self.shared_bytes),
                *(self.copied_bytes, self.gathered_bytes, self.moved_bytes),
            ],
        }

    def cells(self, *, frozen: bool = True) -> Iterator[tuple[str, Cell, Route]]:
        """Every cell with its tensor's name and its route, in order."""
        for one in (*self.frozen_rounds * frozen, *self.rounds):
            for cells in one:
                for cell, route in self.patterns[cells.pattern][cells.first : cells.last]:
                    yield cells.name, cell, self.routes[route]

    def describe(self) -> str:
        def size(count: int) -> str:
            return f"{count:,} bytes"

        names = len(set().union(*self.shared.values())) if self.shared else 0
        text = (
            f"shared {size(self.shared_bytes)} ({names} tensors in place), copied "
            f"{size(self.copied_bytes)}, gathered from other ranks {size(self.gathered_bytes)}"
        )
        if self.gathered_bytes:
            text += (
                f" in {len(self.rounds) + len(self.frozen_rounds)} rounds of at most "
                f"{size(self.slot_bytes)} a rank, {len(self.groups)} broadcast groups"
            )
        return text

    def tensor_lines(self, target: WeightLayout) -> list[str]:
        """Treatment of each kind of tensor (layers together), with bytes over all ranks."""
        moved = {name for name, _, route in self.cells() if route.num_receivers}
        bytes_by: dict[tuple[str, str], int] = {}
        for table, shared, ranks in _target_groups(target, self.shared):
            for name, held in table.items():
                if name in shared:
                    how = "shared"
                else:
                    gathered = any(piece.name in moved for piece in held.slices)
                    how = "gathered" if gathered else "copied"
                key = (re.sub(r"\.\d+\.", ".*.", name), how)
                bytes_by[key] = bytes_by.get(key, 0) + held.num_bytes * len(ranks)
        return [f"{name:<36} {how:<9} {n:>16,} bytes" for (name, how), n in bytes_by.items()]


def plan_sync(
    source: WeightLayout,
    target: WeightLayout,
    *,
    node_size: int = 1,
    bucket_bytes: int = DEFAULT_BUCKET,
    share: bool = True,
    merged: frozenset[str] = frozenset(),
) -> SyncPlan:
    """Plan a sync: share equal tensors, copy on one rank, else send a box once to all who lack it.

    Args:
        merged: Hugging Face names of weights that the source computes for every sync from frozen
            ones and an adapter: never shared, and moved by every sync.
        share: the target can use the source's tensors; if False, it has its own of each.
        node_size: ranks of a node; messages stay inside a node if possible.
        bucket_bytes: a sync stages at most two of them on a rank (at least one row of a tensor).

    Raises:
        ValueError: the source does not hold all that the target needs; the tensor is named.
    """
    shared = find_shared(source if share else {}, target, merged)
    slot = max(1, 2 * bucket_bytes // NUM_SLOTS)
    patterns = Patterns(node_size, slot // _CELLS_PER_SLOT or 1)
    ranges: dict[bool, list[CellRange]] = {False: [], True: []}
    for name, cuts in find_cuts(source, target, shared, merged).items():
        pattern, num_cells = patterns.add(name, cuts)
        ranges[cuts.frozen].append(CellRange(name, pattern, 0, num_cells))
    counts = Counter(cells.pattern for some in ranges.values() for cells in some)
    routed, routes, groups = patterns.route(counts)
    world_size = max((*source, *target), default=0) + 1
    rounds = {
        frozen: make_rounds(some, routed, routes, slot, world_size)
        for frozen, some in ranges.items()
    }
    shared_bytes = wanted_bytes = 0
    for table, names, ranks in _target_groups(target, shared):
        for held, alike in shards_by_kind(table):
            in_place = sum(name in names for name in alike) * len(ranks)
            shared_bytes += in_place * held.num_bytes
            num_bytes = sum(piece.numel for piece in held.slices) * held.dtype.itemsize
            wanted_bytes += (len(alike) * len(ranks) - in_place) * num_bytes
    gathered = sum(count * patterns.needed_bytes[number] for number, count in counts.items())
    return SyncPlan(
        shared=shared,
        patterns=routed,
        routes=routes,
        groups=groups,
        rounds=rounds[False],
        frozen_rounds=rounds[True],
        slot_bytes=slot,
        world_size=world_size,
        shared_bytes=shared_bytes,
        copied_bytes=wanted_bytes - gathered,
        gathered_bytes=gathered,
        moved_bytes=sum(
            count * sum(cell.num_bytes * routes[route].num_receivers for cell, route in routed[n])
            for n, count in counts.items()
        ),
    )


def find_shared(
    source: WeightLayout, target: WeightLayout, merged: frozenset[str] = frozenset()
) -> dict[int, frozenset[str]]:
    """Target rank -> local names that the source holds alike there, if sharing is worthwhile."""
    found: dict[tuple[int, int], frozenset[str]] = {}
    equal: dict[frozenset[str], frozenset[str]] = {}
    pairs = _NamePairs(merged)
    shared = {}
    nothing: Table = {}
    for rank, table in target.items():
        own = source.get(rank, nothing)
        if not own:
            shared[rank] = equal.setdefault(frozenset(), frozenset())
            continue
        pair = (id(own), id(table))
        if pair not in found:
            names: frozenset[str] = frozenset(
                name
                for alike in pairs.of(own, table)
                if table[alike[0]].is_like(own[alike[0]])
                for name in alike
            )
            if named_bytes(table, names) < WORTH_SHARING * _num_bytes(own):
                names = frozenset()
            found[pair] = equal.setdefault(names, names)
        shared[rank] = found[pair]
    return shared


def _num_bytes(table: Table) -> int:
    return sum(held.num_bytes * count for held, count in counted(table))


_NamesOfKind = tuple[Hashable, tuple[str, ...]]
"""A local name's kind, and its slices' names."""


class _NamePairs:
    """Groups of local names of two tables: a group is alike in both tables as a whole, or not.

    Args:
        omitted: tensors with a slice of one of these names are in no group.
    """

    def __init__(self, omitted: frozenset[str]) -> None:
        self._omitted = omitted
        self._known: dict[tuple[int, int], tuple[Kinds, Kinds, list[list[str]]]] = {}

    def of(self, one: Table, other: Table) -> list[list[str]]:
        first, second = _own_kinds(one), _own_kinds(other)
        at = (id(first), id(second))
        if at not in self._known:
            if isinstance(first, LayerKinds) and isinstance(second, LayerKinds):
                found = self._alike_by_layers(first, second)
            else:
                found = self._alike(kinds_of(one), kinds_of(other))
            groups: dict[Hashable, list[str]] = {}
            for group, name in found:
                groups.setdefault(group, []).append(name)
            # both kinds are kept, so that no other object gets their ids
            self._known[at] = (first, second, list(groups.values()))
        return self._known[at][2]

    def _alike_by_layers(
        self, first: LayerKinds, second: LayerKinds
    ) -> Iterator[tuple[Hashable, str]]:
        """Yield what `_alike` does; layers that are alike in both are compared once."""
        if self._omitted:
            return self._alike(first.listed, second.listed)
        return _alike_by_layers(first, second)

    def _alike(self, first: Kinds, second: Kinds) -> Iterator[tuple[Hashable, str]]:
        """Yield the local names that both have, each with its group."""
        for name, here in second.items():
            if name in first and self._omitted.isdisjoint(here[1]):
                yield _group(first[name], here), name


def _own_kinds(table: Table) -> Kinds:
    return table.kinds if isinstance(table, KindTable) else kinds_of(table)


def _group(there: _NamesOfKind, here: _NamesOfKind) -> Hashable:
    """Key of the local names whose tensors are of these kinds, and have slices in common so."""
    (kind_there, names_there), (kind, names) = there, here
    # which of their slices are of one tensor; a layer's experts have a thousand
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names_there):
        places.setdefault(name, []).append(place)
    return kind_there, kind, tuple(tuple(places.get(name, ())) for name in names)


def _alike_by_layers(first: LayerKinds, second: LayerKinds) -> Iterator[tuple[Hashable, str]]:
    """Yield what `_NamePairs._alike` does; layers that are alike in both are compared once."""
    known: dict[tuple[int, int], list[tuple[Hashable, str]]] = {}
    for part in second.parts:
        there = None if part.layer is None else first.by_layer.get(part.layer)
        if part.layer is None or there is None:
            for name, here in part.rows:
                own = name if part.layer is None else in_layer(name, part.first, part.layer)
                if own in first:
                    yield _group(first[own], here), own
            continue
        at = (id(there.rows), id(part.rows))
        if at not in known:
            rows = {
                in_layer(name, there.first, part.first): (
                    kind,
                    tuple(in_layer(one, there.first, part.first) for one in names),
                )
                for name, (kind, names) in there.rows
            }
            known[at] = [
                (_group(rows[name], here), name) for name, here in part.rows if name in rows
            ]
        for group, name in known[at]:
            yield group, in_layer(name, part.first, part.layer)


def _target_groups(
    target: WeightLayout, shared: Mapping[int, frozenset[str]]
) -> list[tuple[Table, frozenset[str], list[int]]]:
    """Groups of ranks that hold the same table and share the same names of it."""
    groups: dict[tuple[int, frozenset[str]], tuple[Table, frozenset[str], list[int]]] = {}
    for rank, table in target.items():
        at = (id(table), shared[rank])
        groups.setdefault(at, (table, shared[rank], []))[2].append(rank)
    return list(groups.values())


def _as_list(cells: CellRange) -> list[object]:
    return [cells.name, cells.pattern, cells.first, cells.last]
