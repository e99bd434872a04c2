"""`BlockPool`: bookkeeping of free, used and shared blocks of the key-value cache. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BlockPool:
    """Reference-counted blocks `0 ... num_blocks - 1`; the block freed last is allocated first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take a free block and reference it once; the caller has made sure that `num_free > 0`."""
        assert self._free, "no free block"
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, *blocks: int) -> None:
        """Add a reference to each."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] += 1

    def release(self, *blocks: int) -> None:
        """Remove a reference from each; removing the last one frees the block."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def state(self) -> dict[str, Any]:
        """Return JSON values from which `restore` makes an equal pool of the same size."""
        return {"references": self._references, "free": self._free}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Adopt the `state()` of another pool of the same size."""
        assert len(state["references"]) == self.num_blocks, self.num_blocks
        self._references, self._free = list(state["references"]), list(state["free"])
