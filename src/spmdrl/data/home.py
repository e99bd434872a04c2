"""The data of a step as home rows: each rank gets its contiguous part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spmdrl.batch import Batch
from spmdrl.data.order import Stream
from spmdrl.launch import World


class DataSet(Protocol):
    """Prompts, conversations or preference pairs: items that every rank knows, in one order."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int], first_id: int) -> Batch:
        """Some items as rows; `prompt_ids` count from `first_id`, item by item.

        The columns are the same for any number of items, none included.
        """
        ...

    def texts(self) -> list[str]:
        """The prompts' texts."""
        ...


class StepRows:
    """Every rank knows all items and their order; `batch` gives the rows whose home is here."""

    def __init__(self, world: World, data: DataSet, stream: Stream) -> None:
        self.world, self.data, self.stream = world, data, stream

    def batch(self, step: int, *, attempt: int = 0, count: int | None = None) -> Batch:
        """Home rows of a step's items, or of its refill `attempt` (`count` of them at most).

        `prompt_ids` are places in the step, so they differ between attempts.
        """
        indices = self.stream.indices(step, attempt)[:count]
        first = attempt * self.stream.prompts_per_step
        return home_rows(self.world, self.data, indices, first_id=first)


def home_rows(
    world: World, data: DataSet, indices: Sequence[int] | None = None, *, first_id: int = 0
) -> Batch:
    """This rank's contiguous part of the items at `indices` (of all of them, without): see
    `DataSet.rows`.
    """
    chosen = range(len(data)) if indices is None else indices
    low = len(chosen) * world.rank // world.size
    high = len(chosen) * (world.rank + 1) // world.size
    return data.rows(chosen[low:high], first_id + low)
