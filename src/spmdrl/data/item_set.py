"""`ItemSet`: conversations or preference pairs that can be divided, joined and drawn from."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Protocol, Self, TypeVar, overload

from spmdrl.batch import Batch


class DataItem(Protocol):
    """One conversation or preference pair."""

    @property
    def text(self) -> str:
        """The first user message, before any template."""

    @property
    def mark(self) -> bytes:
        """Digest of the item's row, see `data.identity`."""

    @property
    def token_lists(self) -> tuple[Sequence[int], ...]:
        """All token ids; items with equal ones are equal."""

    @classmethod
    def rows(cls, items: Sequence[Self], first_id: int) -> Batch:
        """Make the items' rows; `prompt_ids` count from `first_id`, item by item."""


T = TypeVar("T", bound=DataItem)


class ItemSet(Sequence[T]):
    """A `data.order.DataSet` of items of one kind.

    Args:
        kind: class of the items.
        left_out: how many rows were not used, by reason.
    """

    def __init__(
        self, kind: type[T], items: Sequence[T], left_out: Mapping[str, int] | None = None
    ) -> None:
        self.kind, self._items = kind, tuple(items)
        self.left_out = left_out or {}

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> ItemSet[T]: ...

    def __getitem__(self, index: int | slice) -> T | ItemSet[T]:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        return self._items[index]

    def texts(self) -> list[str]:
        return [item.text for item in self._items]

    def openings(self) -> list[str]:
        return self.texts()

    def questions(self) -> list[str]:
        return self.texts()

    def identities(self) -> list[Hashable]:
        return [tuple(map(tuple, item.token_lists)) for item in self._items]

    def marks(self) -> list[bytes]:
        return [item.mark for item in self._items]

    def ids(self) -> Iterator[Sequence[int]]:
        return (ids for item in self._items for ids in item.token_lists)

    def subset(self, indices: Sequence[int]) -> ItemSet[T]:
        return ItemSet(self.kind, [self._items[i] for i in indices], self.left_out)

    def rows(self, indices: Sequence[int], first_id: int) -> Batch:
        """Make rows of some items, see the items' class."""
        return self.kind.rows([self._items[i] for i in indices], first_id)


def items_of(data: object, kind: type[T]) -> ItemSet[T] | None:
    """Return the data if they are items of that kind."""
    return data if isinstance(data, ItemSet) and data.kind is kind else None
