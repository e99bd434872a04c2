"""`LocalShard`: a local tensor as slices of the Hugging Face name space; tables of shards, layouts.

Tables are pure functions of a model's shapes and a mesh's degrees: every rank knows the tensors of
every other rank, and a plan can be made (and printed) without any process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.models.sharding import Slice


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalShard:
    """One local tensor: its shape, dtype, and the slices in it.

    Rows that no slice covers are padding (of a vocabulary, say). Experts that are stacked in one
    tensor are slices one below the other.

    Args:
        frozen: the values never change: syncs after the first can omit them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[Slice, ...]
    frozen: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def is_like(self, other: LocalShard) -> bool:
        """Whether one storage can serve as both tensors."""
        return (self.shape, self.dtype, self.slices) == (other.shape, other.dtype, other.slices)


Table = Mapping[str, LocalShard]
"""Local name -> the rank's tensor of that name."""

WeightLayout = Mapping[int, Table]
"""World rank -> its table; ranks with equal tables may share one object."""

LocalTensors = dict[str, tuple[Tensor, tuple[Slice, ...]]]
"""Local name -> this rank's tensor, and the slices in it."""
