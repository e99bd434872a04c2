"""`LocalShard`: a local tensor as slices of the Hugging Face name space; tables of shards, layouts.

Tables are pure functions of a model's shapes and a mesh's degrees: every rank knows the tensors of
every other rank, and a plan can be made (and printed) without any process.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spmdrl.models.tensors import Slice, in_layer, layer_of, without_expert


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalShard:
    """One local tensor: its shape, dtype, and the slices in it.

    Rows that no slice covers are padding (of a vocabulary, say). Experts that are stacked in one
    tensor are slices one below the other.

    Args:
        frozen: the values never change: syncs after the first can omit them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[Slice, ...]
    frozen: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def is_like(self, other: LocalShard) -> bool:
        """Whether one storage can serve as both tensors."""
        return (self.shape, self.dtype, self.slices) == (other.shape, other.dtype, other.slices)


def local_box(tensor: Tensor, held: Slice) -> Tensor:
    """Return the view of a local tensor that is the slice's box, with the box's dims.

    A local tensor has one dim or two: an expert's box [1, F, D] is F of its rows.
    """
    return tensor[held.offset : held.offset + held.rows].view(held.size)


Table = Mapping[str, LocalShard]
"""Local name -> the rank's tensor of that name."""

Kinds = Mapping[str, tuple[Hashable, tuple[str, ...]]]
"""Local name -> its kind, and its slices' names. Tensors of one kind differ only in names."""


NamedKind = tuple[str, tuple[Hashable, tuple[str, ...]]]
"""Local name, its kind, and its slices' names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KindPart:
    """Local tensors of a layer, or of none.

    Args:
        rows: the tensors, named as in layer `first`; parts that differ in `layer` only share them.
        layer: number of the layer; None: `rows` have their own names.
    """

    rows: tuple[NamedKind, ...]
    layer: int | None = None
    first: int = 0


class LayerKinds(Mapping[str, tuple[Hashable, tuple[str, ...]]]):
    """Kinds by layers: there can be ten thousand local names, which few of the plans' sums need.

    Args:
        parts: the tensors in order; no two are of one layer.
    """

    def __init__(self, parts: Iterable[KindPart]) -> None:
        self.parts = tuple(parts)

    @cached_property
    def listed(self) -> dict[str, tuple[Hashable, tuple[str, ...]]]:
        """All local names, each with its kind and its slices' names."""
        return {
            _in(part, local_name): (kind, tuple(_in(part, name) for name in names))
            for part in self.parts
            for local_name, (kind, names) in part.rows
        }

    @cached_property
    def counts(self) -> dict[Hashable, int]:
        """Kind -> its number of local names, in the order of the first of each."""
        counts: Counter[Hashable] = Counter()
        for rows, times in self._distinct:
            for _, (kind, _) in rows:
                counts[kind] += times
        return counts

    @cached_property
    def firsts(self) -> dict[Hashable, str]:
        """Kind -> one of its local names, as a layer that is alike has it."""
        found: dict[Hashable, str] = {}
        for rows, _ in self._distinct:
            for local_name, (kind, _) in rows:
                found.setdefault(kind, local_name)
        return found

    @cached_property
    def key(self) -> Hashable:
        """Key of the local names, and of which of them are of one kind. Of two objects with equal
        keys, the slices' names differ in numbers of experts only.
        """
        order = {kind: i for i, kind in enumerate(self.counts)}
        numbers = {id(rows): i for i, (rows, _) in enumerate(self._distinct)}
        patterns = tuple(
            tuple(
                (local, order[kind], tuple(map(without_expert, own))) for local, (kind, own) in rows
            )
            for rows, _ in self._distinct
        )
        layers = tuple((part.layer, part.first, numbers[id(part.rows)]) for part in self.parts)
        return layers, patterns

    @cached_property
    def _distinct(self) -> list[tuple[tuple[NamedKind, ...], int]]:
        """Distinct rows, each with its number of parts."""
        times = Counter(id(part.rows) for part in self.parts)
        rows = {id(part.rows): part.rows for part in self.parts}
        return [(own, times[at]) for at, own in rows.items()]

    @cached_property
    def others(self) -> list[KindPart]:
        """The parts that are of no layer."""
        return [part for part in self.parts if part.layer is None]

    @cached_property
    def by_layer(self) -> dict[int, KindPart]:
        """Layer -> its part."""
        return {part.layer: part for part in self.parts if part.layer is not None}

    @cached_property
    def _rows(self) -> dict[int, dict[str, tuple[Hashable, tuple[str, ...]]]]:
        """Distinct rows by their ids."""
        return {id(rows): dict(rows) for rows, _ in self._distinct}

    def kind(self, local_name: str) -> Hashable:
        """Return the kind of a local name, without its slices' names."""
        return self._find(local_name)[1][0]

    def _find(self, local_name: str) -> tuple[KindPart, tuple[Hashable, tuple[str, ...]]]:
        layer = layer_of(local_name)
        if layer is not None and (part := self.by_layer.get(layer)) is not None:
            found = self._rows[id(part.rows)].get(in_layer(local_name, layer, part.first))
            if found is not None:
                return part, found
        for part in self.others:
            if local_name in self._rows[id(part.rows)]:
                return part, self._rows[id(part.rows)][local_name]
        raise KeyError(local_name)

    def __getitem__(self, local_name: str) -> tuple[Hashable, tuple[str, ...]]:
        part, (kind, names) = self._find(local_name)
        return kind, tuple(_in(part, name) for name in names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.listed)

    def __len__(self) -> int:
        return sum(self.counts.values())


def _in(part: KindPart, name: str) -> str:
    if part.layer is None or part.layer == part.first:
        return name
    return in_layer(name, part.first, part.layer)


class KindTable(Mapping[str, LocalShard]):
    """A table by kinds: layers are alike, and the slices of many ranks could be a million.

    Args:
        kinds: one object for all ranks that hold shards of the same tensors.
        shards: kind -> this rank's shard of it; a slice has its name's index in place of the name.
    """

    def __init__(self, kinds: Kinds, shards: Mapping[Hashable, LocalShard]) -> None:
        self.kinds, self.shards = kinds, shards

    @cached_property
    def counts(self) -> Mapping[Hashable, int]:
        """Kind -> number of its tensors."""
        if isinstance(self.kinds, LayerKinds):
            return self.kinds.counts
        return Counter(kind for kind, _ in self.kinds.values())

    def __getitem__(self, local_name: str) -> LocalShard:
        kind, names = self.kinds[local_name]
        shard = self.shards[kind]
        slices = tuple(
            Slice(
                name=names[int(s.name)], shape=s.shape, start=s.start, stop=s.stop, offset=s.offset
            )
            for s in shard.slices
        )
        return LocalShard(shape=shard.shape, dtype=shard.dtype, slices=slices, frozen=shard.frozen)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)


def counted(table: Table) -> list[tuple[LocalShard, int]]:
    """The kinds of tensors of a table, each with its number of tensors, for what adds up sizes;
    slices may lack their names, which take far longer to make for every layer than the sum.
    """
    if not isinstance(table, KindTable):
        return [(held, 1) for held in table.values()]
    return [(table.shards[kind], count) for kind, count in table.counts.items()]


def one_of_each(table: Table) -> Mapping[str, LocalShard]:
    """A tensor of each kind by its local name, or that of a layer that is alike; see `counted`."""
    if not isinstance(table, KindTable):
        return table
    if isinstance(table.kinds, LayerKinds):
        return {name: table.shards[kind] for kind, name in table.kinds.firsts.items()}
    return {name: table.shards[kind] for name, (kind, _) in table.kinds.items()}


def shard_of(table: Table, local_name: str) -> LocalShard:
    """A tensor of a table as `counted` has it."""
    if not isinstance(table, KindTable):
        return table[local_name]
    if isinstance(table.kinds, LayerKinds):
        return table.shards[table.kinds.kind(local_name)]
    return table.shards[table.kinds[local_name][0]]


def named_bytes(table: Table, names: Iterable[str]) -> int:
    """Bytes of the tensors of a table with these local names."""
    return sum(shard_of(table, name).num_bytes for name in names)


WeightLayout = Mapping[int, Table]
"""World rank -> its table; ranks with equal tables may share one object."""

LocalTensors = dict[str, tuple[Tensor, tuple[Slice, ...]]]
"""Local name -> this rank's tensor, and the slices in it."""
