"""Home rows of a step's data: each rank gets a contiguous share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spmdrl.batch import Batch
from spmdrl.data.order import Stream
from spmdrl.world import World


class DataSet(Protocol):
    """Prompts, conversations or preference pairs, known to every rank in the same order."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int], first_id: int) -> Batch:
        """Make rows of some items; `prompt_ids` count from `first_id`, item by item.

        The columns are the same for any number of items, even for none.
        """

    def texts(self) -> list[str]:
        """Texts of the prompts."""


class StepRows:
    """Rows of each step: every rank knows all items, `batch` gives those whose home is here."""

    def __init__(self, world: World, data: DataSet, stream: Stream) -> None:
        self.world, self.data, self.stream = world, data, stream

    def batch(self, step: int, *, attempt: int = 0, count: int | None = None) -> Batch:
        """Home rows of a step's items, or of its refill `attempt`, at most `count` items.

        `prompt_ids` number the step's items, and continue in its refills.
        """
        indices = self.stream.indices(step, attempt)[:count]
        first = attempt * self.stream.prompts_per_step
        return home_rows(self.world, self.data, indices, first_id=first)


def home_rows(
    world: World, data: DataSet, indices: Sequence[int] | None = None, *, first_id: int = 0
) -> Batch:
    """This rank's contiguous share of the items at `indices` (None: of all items), as rows of
    `DataSet.rows`.
    """
    chosen = range(len(data)) if indices is None else indices
    low = len(chosen) * world.rank // world.size
    high = len(chosen) * (world.rank + 1) // world.size
    return data.rows(chosen[low:high], first_id + low)
