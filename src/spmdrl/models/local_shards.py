"""`LocalShard`: a local tensor as slices of the Hugging Face name space; tables of shards, layouts.

Tables are pure functions of a model's shapes and a mesh's degrees: every rank knows the tensors of
every other rank, and a plan can be made (and printed) without any process.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spmdrl.models.tensors import Slice


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


class LaterKinds(Mapping[str, tuple[Hashable, tuple[str, ...]]]):
    """Kinds whose local names are listed when one is asked for: plans mostly need their numbers.

    Args:
        names: lists all local names, each with its kind and its slices' names.
        counts: kind -> its number of local names, in the order of the first of each.
        key: of two objects with equal keys, both list the same local names, the same of them are of
            one kind, and slices' names differ in numbers of experts only.
    """

    def __init__(
        self,
        names: Callable[[], Iterator[NamedKind]],
        counts: Mapping[Hashable, int],
        key: Hashable,
    ) -> None:
        self._names, self.counts, self.key = names, counts, key

    @cached_property
    def listed(self) -> dict[str, tuple[Hashable, tuple[str, ...]]]:
        """All local names, each with its kind and its slices' names."""
        return dict(self._names())

    def __getitem__(self, local_name: str) -> tuple[Hashable, tuple[str, ...]]:
        return self.listed[local_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.listed)

    def __len__(self) -> int:
        return sum(self.counts.values())


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
        if isinstance(self.kinds, LaterKinds):
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


def sized(table: Table) -> Mapping[str, LocalShard]:
    """The tensors of a table by name, as `counted` has them."""
    if not isinstance(table, KindTable):
        return table
    return {name: table.shards[kind] for name, (kind, _) in table.kinds.items()}


def named_bytes(table: Table, names: Collection[str]) -> int:
    """Bytes of the tensors of a table with these local names."""
    if not isinstance(table, KindTable):
        return sum(table[name].num_bytes for name in names)
    return sum(table.shards[table.kinds[name][0]].num_bytes for name in names)


WeightLayout = Mapping[int, Table]
"""World rank -> its table; ranks with equal tables may share one object."""

LocalTensors = dict[str, tuple[Tensor, tuple[Slice, ...]]]
"""Local name -> this rank's tensor, and the slices in it."""
