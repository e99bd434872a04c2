"""The runner's interface to attention over a paged key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spmdrl.rollout.native.scheduler import StepPlan


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of a rank's key-value cache."""

    num_layers: int
    num_blocks: int
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """Number of query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def num_bytes(self) -> int:
        values = self.num_blocks * self.block_size * self.kv_heads * self.head_dim
        return 2 * self.num_layers * values * self.dtype.itemsize


class PagedAttention(Protocol):
    """Attention over a block cache that it owns; after `prepare` it is the decoder's `Attend`."""

    def prepare(self, plan: StepPlan) -> None:
        """Copy the plan's blocks and build the indices that all layers use."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; rows are one for each of the plan's decodes, then the tokens of its chunks."""

    def caches(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return keys and values by layer, blocks first, to be read and written between steps."""


def copy_blocks(pairs: Sequence[tuple[int, int]], caches: Sequence[Tensor]) -> None:
    """Copy the (source, target) blocks of every cache; all are read before any is written."""
    if pairs:
        source, target = torch.tensor(pairs, device=caches[0].device).unbind(1)
        for cache in caches:
            cache.index_copy_(0, target, cache.index_select(0, source))
