"""`BlockPool`: which blocks of the key-value cache are free, used or shared. Pure Python."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any


class BlockPool:
    """Reference-counted blocks `0 ... num_blocks - 1`.

    Blocks of one sequence alone are taken from the low end and blocks to be shared from the high
    end, lowest (highest) first, so that each kind lies dense at its end: attention on the CPU
    reads both as views, without gathering (see `BlockwiseAttention`). `compact` makes them dense
    again after blocks were freed.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._references = [0] * num_blocks
        self._low = list(range(num_blocks))
        self._high = [-block for block in reversed(range(num_blocks))]
        self._is_high = bytearray(num_blocks)

    def allocate(self, *, high: bool = False) -> int:
        """A free block, referenced once; the caller has made sure that `num_free > 0`."""
        assert self.num_free > 0, "no free block"
        block = self._lowest(remove=True) if not high else self._highest(remove=True)
        self.num_free -= 1
        self._references[block] = 1
        self._is_high[block] = high
        return block

    def share(self, block: int) -> None:
        """One more reference."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free(block)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def compact(self, *, waste: float = 0.35) -> dict[int, int]:
        """Moves (block -> free block) that close the gaps; empty unless gaps pay for the copying.

        Args:
            waste: the least fraction of gaps within an end for which it is compacted.
        """
        moves: dict[int, int] = {}
        used = [b for b in range(self.num_blocks) if self._references[b]]
        low = [b for b in used if not self._is_high[b]]
        high = [b for b in used if self._is_high[b]]
        if low and len(low) < (1 - waste) * (low[-1] + 1):
            for block in reversed(low):
                if not self.num_free or (target := self._lowest(remove=False)) > block:
                    break
                self._move(block, target, moves)
        if high and len(high) < (1 - waste) * (self.num_blocks - high[0]):
            for block in high:
                if not self.num_free or (target := self._highest(remove=False)) < block:
                    break
                self._move(block, target, moves)
        return moves

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` makes an equal pool of the same size."""
        return {
            "references": self._references,
            "low": self._low,
            "high": self._high,
            "is_high": list(self._is_high),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what the pool was whose `state()` it is."""
        assert len(state["references"]) == self.num_blocks, self.num_blocks
        self._references = list(state["references"])
        self._low, self._high = list(state["low"]), list(state["high"])
        self._is_high = bytearray(state["is_high"])
        self.num_free = self._references.count(0)

    def _move(self, block: int, target: int, moves: dict[int, int]) -> None:
        self._references[target] = self._references[block]
        self._is_high[target] = self._is_high[block]
        self._references[block] = 0
        heapq.heappush(self._low, block)
        heapq.heappush(self._high, -block)
        moves[block] = target

    def _free(self, block: int) -> None:
        self.num_free += 1
        heapq.heappush(self._low, block)
        heapq.heappush(self._high, -block)

    # A block lies in both heaps while it is free, and is dropped from the other one when it comes
    # up there while used. A block may thus lie in a heap twice, which does no harm.

    def _lowest(self, *, remove: bool) -> int:
        while self._references[self._low[0]]:
            heapq.heappop(self._low)
        return heapq.heappop(self._low) if remove else self._low[0]

    def _highest(self, *, remove: bool) -> int:
        while self._references[-self._high[0]]:
            heapq.heappop(self._high)
        return -heapq.heappop(self._high) if remove else -self._high[0]
