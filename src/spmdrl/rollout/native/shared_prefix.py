"""`SharedPrefix`: the tokens with which all prompts of a call begin, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.sample import Sample


class SharedPrefix:
    """Cache blocks of the common prefix, held from the step that computes it until they are needed;
    with the slot of recurrent layers' states after it.

    Args:
        length: number of tokens; 0: nothing is shared.
        owner: the sample that computes them; None from then on.
        slots: the slots, if the model has recurrent layers.
    """

    def __init__(
        self,
        length: int,
        owner: Sample | None,
        pool: BlockPool,
        block_size: int,
        slots: BlockPool | None = None,
    ) -> None:
        self.length, self._pool, self._block_size = length, pool, block_size
        self._slots = slots
        self.owner = owner if length else None
        self.blocks: list[int] = []
        self.slot: int | None = None

    @property
    def cached(self) -> int:
        """Number of tokens in the held blocks."""
        return self.length if self.blocks else 0

    def keep(self) -> None:
        """Hold the blocks of the owner if it has computed them."""
        if self.owner is not None and self.owner.cached >= self.length:
            self.blocks = self.owner.blocks[: -(-self.length // self._block_size)]
            self._pool.share(*self.blocks)
            if self._slots is not None and self.owner.slot is not None:
                self.slot = self.owner.slot
                self._slots.share(self.slot)
            self.owner = None

    def stop_of(self, sample: Sample, stop: int) -> int:
        """Return where a chunk of a sample ends that could end at `stop`: states are only known at
        the ends of chunks, so that with recurrent layers the owner's prefix is chunks of its own.
        """
        if self._slots is None or sample is not self.owner:
            return stop
        return min(stop, self.length)

    def drop(self) -> bool:
        """Release the blocks; return whether any were held."""
        held, self.blocks = self.blocks, []
        self._pool.release(*held)
        if self._slots is not None and self.slot is not None:
            self._slots.release(self.slot)
            self.slot = None
        return bool(held)

    def state(self, number: Mapping[Sample, int]) -> dict[str, Any]:
        """Return JSON values from which `restore` makes an equal prefix; its owner by `number`."""
        return {
            "prefix": self.length,
            "prefix_owner": None if self.owner is None else number[self.owner],
            "prefix_blocks": self.blocks,
            "prefix_slot": self.slot,
        }

    def restore(self, state: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        """Adopt the `state()` of another prefix."""
        owner = state["prefix_owner"]
        self.owner = None if owner is None else samples[owner]
        self.length, self.blocks = state["prefix"], list(state["prefix_blocks"])
        self.slot = state.get("prefix_slot")


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Count the tokens with which all prompts begin, below the shortest's length; 0 for one prompt.

    A prompt's last token is not counted, since its row gives the first token of the response.
    """
    if len(prompts) < 2:
        return 0
    # All prompts share a prefix if the smallest and the largest in lexical order do.
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))
