"""Helpers for rows laid end to end: the row of a token, sums over rows, the last response token,
and sums of token metrics in the form that `algorithms.metrics` combines.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spmdrl.algorithms.metrics import TOKENS, is_max


def check_columns(
    lengths: Tensor,  # [B] int64 tokens per row
    loss_mask: Tensor,  # [T] bool
    **columns: Tensor,  # [T] each
) -> None:
    """Raise ValueError, naming the column, if one is not `[T]` or the mask is not bool."""
    if loss_mask.dtype != torch.bool:
        # An integer mask would be taken for indices.
        raise ValueError(f"loss_mask is {loss_mask.dtype}: it must be bool")
    num_tokens = int(lengths.sum())
    for name, column in {"loss_mask": loss_mask, **columns}.items():
        if tuple(column.shape) != (num_tokens,):
            raise ValueError(
                f"{name} has the shape {tuple(column.shape)}, but the rows have {num_tokens} tokens"
            )


def row_of_token(lengths: Tensor) -> Tensor:  # [B] int64
    """The row of every token: int64 `[T]`."""
    rows = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(rows, lengths)


def masked_row_sums(
    column: Tensor,  # [T]
    lengths: Tensor,  # [B] int64
    loss_mask: Tensor,  # [T] bool
) -> Tensor:
    """The sum over each row's tokens in the mask (values outside may be NaN): float64 `[B]`."""
    kept = torch.where(loss_mask, column, 0).double()
    return kept.new_zeros(len(lengths)).index_add(0, row_of_token(lengths), kept)


def last_tokens(
    lengths: Tensor,  # [B] int64
    loss_mask: Tensor,  # [T] bool
) -> tuple[Tensor, Tensor]:
    """Each row's last token in the mask, for the rows that have one.

    Returns:
        rows: int64 `[K]`, ascending.
        places: int64 `[K]`, their indices in the token columns.
    """
    places = loss_mask.nonzero().flatten()
    row = row_of_token(lengths)[places]
    last = torch.full_like(lengths, -1).scatter_reduce(0, row, places, "amax")
    rows = (last >= 0).nonzero().flatten()
    return rows, last[rows]


def metric_sums(
    values: Mapping[str, Tensor],  # [N] each
    live: Tensor,  # [N] bool: the tokens that count
) -> dict[str, Tensor]:
    """Sum each metric over the live tokens (or take its maximum) and count them as `tokens`.

    Sums are float64 and without gradient; nothing waits for the device.
    """
    sums = {TOKENS: live.sum(dtype=torch.float64)}
    for name, value in values.items():
        kept = torch.where(live, value.detach().double(), 0.0)
        # A microbatch can be empty, and the maximum of no values is an error: add a 0.
        sums[name] = torch.cat([kept, kept.new_zeros(1)]).amax() if is_max(name) else kept.sum()
    return sums


def discounted_sums(
    terms: Tensor,  # [N]
    left: Tensor,  # [N] int64: number of terms after each in its row
    factor: float,
) -> Tensor:
    """sum_l factor^l terms[i + l] for l = 0 to left[i], the terms after i in its row: `[N]`.

    The span that a sum reaches over doubles each time (Hillis & Steele 1986, "Data Parallel
    Algorithms"): log2 of the longest row passes, no padding, and no row sees another.
    """
    longest = int(left.max()) + 1 if len(left) else 0
    sums, reach = terms, 1
    while reach < longest:
        beyond = torch.where(left >= reach, sums.roll(-reach), 0.0)
        sums = sums + factor**reach * beyond
        reach *= 2
    return sums
