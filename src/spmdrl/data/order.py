"""Which prompts a step draws: a pure function of seed and step, so that a resume is the same call.

The shuffle sorts indices by a keyed 64-bit hash (splitmix64) instead of using a library's
generator: the order is then the same in every version of every library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PromptStream:
    """Shuffled epochs over `num_prompts` prompts, `prompts_per_step` at a time.

    An epoch is as many whole steps as the data give; what is left over (less than a step, other
    prompts in every epoch) waits for a later epoch. So no prompt comes twice in an epoch, and none
    twice in a step, where two groups of one prompt would draw the same random numbers.

    Raises:
        ValueError: fewer prompts than one step draws.
    """

    seed: int
    num_prompts: int
    prompts_per_step: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.prompts_per_step <= self.num_prompts:
            raise ValueError(
                f"a step draws {self.prompts_per_step} prompts, the data have {self.num_prompts}: "
                "prompts per step must be between 1 and the prompts there are"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_prompts // self.prompts_per_step

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of a step (from 0)."""
        return step // self.steps_per_epoch

    def indices(self, step: int, attempt: int = 0) -> list[int]:
        """The prompts of a step, as indices into the data.

        Args:
            step: from 0.
            attempt: 0 for the step's own prompts; 1, 2, … for refills (groups without signal are
                replaced), drawn without repetition from the prompts that the step's earlier
                attempts left, whichever step of the epoch they belong to.

        Returns:
            `prompts_per_step` indices; fewer, at last none, when refills have used up the data.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        first = within * self.prompts_per_step
        own = order[first : first + self.prompts_per_step]
        if attempt == 0:
            return [int(i) for i in own]
        rest = np.delete(order, slice(first, first + self.prompts_per_step))
        rest = rest[permutation(len(rest), self.seed, 1, step)]
        first = (attempt - 1) * self.prompts_per_step
        return [int(i) for i in rest[first : first + self.prompts_per_step]]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_prompts, dtype=np.int64)
        return permutation(self.num_prompts, self.seed, 0, epoch)


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of `range(count)` that depends on the key's integers alone: int64 `[count]`."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part % 2**64))
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ state), kind="stable")


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64: Steele, Lea, Flood 2014, 'Fast splittable pseudorandom number generators'."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
