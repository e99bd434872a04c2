"""The prompts of a step as home rows: each rank gets its contiguous part."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spmdrl.batch import Batch, from_rows
from spmdrl.data.order import PromptStream
from spmdrl.data.prompts import Prompt
from spmdrl.launch import World


class StepPrompts:
    """Every rank knows all prompts and their order; `batch` gives the rows whose home is here."""

    def __init__(self, world: World, prompts: Sequence[Prompt], stream: PromptStream) -> None:
        self._world, self._prompts, self._stream = world, prompts, stream

    def batch(self, step: int, *, attempt: int = 0, count: int | None = None) -> Batch:
        """Home rows of a step's prompts, or of its refill `attempt` (`count` of them at most).

        `prompt_ids` are places in the step, so they differ between attempts.
        """
        indices = self._stream.indices(step, attempt)[:count]
        first = attempt * self._stream.prompts_per_step
        return home_rows(self._world, [self._prompts[i] for i in indices], first_id=first)


def home_rows(world: World, prompts: Sequence[Prompt], *, first_id: int = 0) -> Batch:
    """This rank's contiguous part: `tokens`, `prompt_ids` and the Python column `prompt`."""
    low = len(prompts) * world.rank // world.size
    high = len(prompts) * (world.rank + 1) // world.size
    own = [prompts[i] for i in range(low, high)]
    return from_rows(
        [p.tokens for p in own],
        rows={"prompt_ids": torch.arange(first_id + low, first_id + high)},
        objects={"prompt": own},
    )
