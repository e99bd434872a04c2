"""`Ragged`: a column with a varying number of values per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Values of each token, in varying number.

    Args:
        counts: number of values of each token, int32 [T].
        values: values of all tokens, laid end to end, [counts.sum()].

    Raises:
        ValueError: the number of values is not the sum of the counts.
    """

    counts: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int32 or self.counts.dim() != 1:
            raise ValueError(
                f"counts must be int32 [T], not {self.counts.dtype} {tuple(self.counts.shape)}"
            )
        if tuple(self.values.shape) != (int(self.counts.sum()),):
            raise ValueError(
                f"a ragged column has the values {tuple(self.values.shape)}, but its counts make "
                f"{int(self.counts.sum())}"
            )

    def __len__(self) -> int:
        return len(self.counts)

    def select(self, index: Tensor) -> Ragged:  # int64 [N]
        """The values of the tokens `index`, in its order."""
        counts = self.counts.long()
        starts = counts.cumsum(0) - counts
        picked = counts[index]
        return Ragged(
            counts=self.counts[index], values=self.values[span_index(starts[index], picked)]
        )

    def to(self, device: torch.device) -> Ragged:
        return Ragged(counts=self.counts.to(device), values=self.values.to(device))

    def padded(self, fill: int) -> Tensor:
        """A row per token, [T, K]: its values, padded with `fill`."""
        counts = self.counts.long()
        width = int(counts.max()) if len(counts) else 0
        table = self.values.new_full((len(counts), width), fill)
        held = torch.arange(width, device=counts.device) < counts[:, None]
        table[held] = self.values
        return table


def join(parts: Sequence[Ragged]) -> Ragged:
    """The tokens of all parts (at least one), in order."""
    return Ragged(
        counts=torch.cat([part.counts for part in parts]),
        values=torch.cat([part.values for part in parts]),
    )


def span_index(starts: Tensor, lengths: Tensor) -> Tensor:
    """Indices of spans `[start, start + length)`, laid end to end."""
    total = int(lengths.sum())
    ends = lengths.cumsum(0)
    within = torch.arange(total, device=lengths.device) - torch.repeat_interleave(
        ends - lengths, lengths
    )
    return torch.repeat_interleave(starts, lengths) + within
