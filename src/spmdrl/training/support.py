"""The softmax over the tokens that truncated sampling could have drawn.

A token that was drawn from the k most likely ones, for example, has the probability of a softmax
over these k. The engine records their ids (at most `rollout.protocol.MAX_SUPPORT`) in the ragged
column `SUPPORT`; the policy, and whatever it is compared with, are read over the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.batch import Ragged
from spmdrl.memory.host_copies import to_device
from spmdrl.models.linear import product, wide_linear
from spmdrl.models.softcap import cap_logits

SUPPORT = "support_ids"
"""Ragged column of the token ids that each token was drawn from; empty if from all tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Support:
    """Args:
    rows: indices of those places that have a support, among the places read, int64 [M], ascending.
    ids: int64 [M, K], the support's tokens, including the target; padded with -1.
    """

    rows: Tensor
    ids: Tensor

    def to(self, device: torch.device) -> Support:
        rows, ids = to_device((self.rows, self.ids), device)
        return Support(rows=rows, ids=ids)


def support_at(column: Ragged, places: Tensor, targets: Tensor) -> Support | None:
    """Return the support of the tokens at `places`; None if all were drawn from all tokens.

    Raises:
        ValueError: a token is not in its own support.
    """
    own = column.select(places)
    rows = own.counts.nonzero().flatten()
    if not len(rows):
        return None
    ids = own.select(rows).padded(-1).long()
    missing = (ids != targets[rows, None]).all(1).nonzero().flatten()
    if len(missing):
        row = rows[missing[0]]
        raise ValueError(
            f"token {int(targets[row])} at place {int(places[row])} of the batch's tokens is not "
            f"among those that {SUPPORT!r} says it was drawn from: whoever changes tokens after "
            "they were sampled must leave that column out, or make a new one"
        )
    return Support(rows=rows, ids=ids)


def support_logits(
    hidden: Tensor,  # [M, D] at the support's rows
    weight: Tensor,  # [V_local, D]
    local: Tensor,  # [M, K] int64, the weight's rows; out of range: another rank's, or padding
    scale: float,
    chunk: int,
    softcap: float | None = None,
) -> Tensor:
    """Compute capped logits times `scale` [M, K], 0 where the row is not held here; at least
    float32.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = torch.zeros(local.shape, dtype=wide, device=hidden.device)
    for own in _chunks(local, len(weight), chunk):
        logits = wide_linear(hidden[own.rows].to(weight.dtype), weight[own.unique])
        logits = cap_logits(logits, softcap)
        out[own.rows][own.held] = logits[own.row, own.column] * scale
    return out


def add_support_gradients(
    d_hidden: Tensor | None,  # [M, D] of the support's rows, added to
    d_weight: Tensor | None,  # [V_local, D], added to
    hidden: Tensor,  # [M, D]
    weight: Tensor,  # [V_local, D]
    local: Tensor,  # [M, K]
    d_logits: Tensor,  # [M, K], of the products: before the cap and the scale
    chunk: int,
) -> None:
    """Add the gradients of the products of a support: per chunk, with its rows of the head."""
    for own in _chunks(local, len(weight), chunk):
        rows = hidden[own.rows].to(weight.dtype)
        factors = d_logits.new_zeros(len(rows), len(own.unique))
        factors[own.row, own.column] = d_logits[own.rows][own.held]
        narrow = factors.to(weight.dtype)
        if d_hidden is not None:
            d_hidden[own.rows].add_(product(narrow, weight[own.unique].t()))
        if d_weight is not None:
            d_weight.index_add_(0, own.unique, product(narrow.t(), rows.t()).to(d_weight.dtype))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """A chunk of the support's rows.

    Args:
        held: bool [rows, K], whether each of the chunk's ids is held by this rank.
        row, column: place of each held id in the product with the weight's rows `unique`.
    """

    rows: slice
    held: Tensor
    row: Tensor
    column: Tensor
    unique: Tensor


def _chunks(local: Tensor, vocab: int, chunk: int) -> Iterator[_Chunk]:
    for start in range(0, len(local), chunk):
        rows = slice(start, min(start + chunk, len(local)))
        own = local[rows]
        held = (own >= 0) & (own < vocab)
        unique, column = torch.unique(own[held], return_inverse=True)
        if len(unique):
            row = held.nonzero()[:, 0]
            yield _Chunk(rows=rows, held=held, row=row, column=column, unique=unique)
