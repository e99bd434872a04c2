"""Classes of ranks whose tensors have the same names and sizes, so that they need one plan only."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from spmdrl.models.local_shards import Kinds, KindTable, LayerKinds, LocalShard, Table
from spmdrl.models.tensors import without_expert
from spmdrl.weights.layout import kinds_of


class TableClasses:
    """Numbers of tables: equal ones for tables that differ only in places of slices and experts.

    Such tables have the same local names, and under each a tensor with the same shape, dtype and
    slices' names, except for the numbers of experts in them. A table must live as long as this
    object.
    """

    def __init__(self) -> None:
        self._tables: dict[int, int] = {}
        self._orders: dict[int, tuple[int, tuple[Hashable, ...], Kinds]] = {}
        self._patterns: dict[object, int] = {}
        self._numbers: dict[object, int] = {}

    def number(self, table: Table) -> int:
        """Return the number of the table's class."""
        if id(table) not in self._tables:
            pattern, order = self._order(table)
            shards: Mapping[Hashable, LocalShard] = table  # type: ignore[assignment]
            if isinstance(table, KindTable):
                shards = table.shards
            sizes = tuple(map(_size, map(shards.__getitem__, order)))
            alike = (pattern, sizes)
            self._tables[id(table)] = self._numbers.setdefault(alike, len(self._numbers))
        return self._tables[id(table)]

    def _order(self, table: Table) -> tuple[int, tuple[Hashable, ...]]:
        """Return a number for the table's names and for which of them are of one kind, and its
        kinds in the order in which they occur.
        """
        later = table.kinds if isinstance(table, KindTable) else None
        if isinstance(later, LayerKinds):
            return self._patterns.setdefault(later.key, len(self._patterns)), tuple(later.counts)
        kinds = kinds_of(table)
        if id(kinds) not in self._orders:
            places: dict[Hashable, int] = {}
            pattern = tuple(
                (name, places.setdefault(kind, len(places)), tuple(map(without_expert, names)))
                for name, (kind, names) in kinds.items()
            )
            number = self._patterns.setdefault(pattern, len(self._patterns))
            # the kinds are kept, so that no other object gets their id
            self._orders[id(kinds)] = number, tuple(places), kinds
        number, order, _ = self._orders[id(kinds)]
        return number, order


def _size(shard: LocalShard) -> tuple[object, ...]:
    return (shard.shape, shard.dtype, shard.frozen, *[piece.name for piece in shard.slices])
