"""What the runner needs of attention over a paged key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .scheduler import StepPlan


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
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def num_bytes(self) -> int:
        values = self.num_blocks * self.block_size * self.kv_heads * self.head_dim
        return 2 * self.num_layers * values * self.dtype.itemsize


class PagedAttention(Protocol):
    """Attention over a block cache that it owns; an `Attend` of the decoder after `prepare`."""

    def prepare(self, plan: StepPlan) -> None:
        """Copy the plan's blocks and build the indices that all layers use."""
        ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows: one for each of the plan's decodes, then the tokens of its chunks."""
        ...

    def caches(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values by layer, blocks first: to be read and written between steps."""
        ...
