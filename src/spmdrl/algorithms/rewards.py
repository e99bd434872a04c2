"""Reward shaping and the filter of dynamic sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.algorithms.advantages import group_spread
from spmdrl.algorithms.kl import at_least_float32


def overlong_penalty(
    lengths: Tensor,  # [B] response tokens
    *,
    max_tokens: int,
    buffer: int,
    factor: float = 1.0,
) -> Tensor:
    """Soft overlong punishment, a term to add to the rewards: float32 `[B]` in [-factor, 0].

    DAPO, arXiv 2503.14476, eq. 13: 0 up to `max_tokens - buffer` tokens, then falling linearly to
    -1 at `max_tokens`; times `factor`.

    Raises:
        ValueError: not 0 < buffer <= max_tokens, or factor negative.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(
            f"overlong buffer={buffer} with max_tokens={max_tokens}: it must be 1 to max_tokens"
        )
    if factor < 0:
        raise ValueError(f"overlong factor={factor}: it must not be negative")
    within = (max_tokens - buffer - lengths).float() / buffer
    return factor * within.clamp(-1.0, 0.0)


def kl_in_reward(
    rewards: Tensor,  # [B]
    token_kl: Tensor,  # [T] estimates of `kl`, without gradient
    loss_mask: Tensor,  # [T] bool: response tokens
    lengths: Tensor,  # [B] int64 tokens per row
    *,
    coefficient: float,
) -> Tensor:
    """R_i = r_i - coefficient * sum of the KL estimates over response i: `[B]`.

    The KL-regularised reward of RLHF (Stiennon et al., arXiv 2009.01325, section 3.4), summed over
    the response for algorithms with one reward per response. Use k1: its gradient through the
    advantage is that of the KL itself.
    """
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    kept = torch.where(loss_mask, token_kl, 0).double()
    sums = kept.new_zeros(len(lengths)).index_add(0, row, kept)
    return (rewards.double() - coefficient * sums).to(at_least_float32(rewards).dtype)


def has_signal(
    rewards: Tensor,  # [B]
    prompt_ids: Tensor,  # [B] int64
) -> Tensor:
    """Whether the rewards of a group differ: bool `[num_groups]`, in order of first appearance.

    The constraint of DAPO's dynamic sampling (arXiv 2503.14476, eq. 11), for any reward: a group
    whose rewards are all equal gives no gradient and is replaced. The order is that of
    `spmdrl.batch.group_index`, so `has_signal(...)[group_index(prompt_ids)[0]]` selects rows.

    Raises:
        ValueError: shapes differ, or a reward is not finite.
    """
    low, high = group_spread(rewards, prompt_ids)
    return low != high
