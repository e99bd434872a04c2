"""Advantages from one reward per response, some relative to its group (the samples of one prompt),
and whitening with given moments.

A group is whole on its rank, so nothing here is reduced over ranks or computes statistics of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spmdrl.algorithms.kl import at_least_float32
from spmdrl.algorithms.reward_shaping import token_rewards
from spmdrl.algorithms.value_loss import gae
from spmdrl.batch import group_index


def group_advantages(
    rewards: Tensor,  # [B]
    prompt_ids: Tensor,  # [B] int64: equal for the samples of one prompt
    *,
    std: bool,
    eps: float = 1e-6,
) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) over the group of i: float32 `[B]`.

    GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2; the deviation is the sample's (n - 1), as
    in TRL and verl. `std=False` omits the division: Dr.GRPO, arXiv 2503.20783, section 3.2. A
    group of one, or with equal rewards only, has advantages of exactly 0.

    Raises:
        ValueError: shapes differ, or a reward is not finite (its rows are named).
    """
    centred, counts, flat = _centred(rewards, prompt_ids)
    if std:
        index, num_groups = group_index(prompt_ids)
        squares = centred.new_zeros(num_groups).index_add(0, index, centred.square())[index]
        centred = centred / ((squares / (counts - 1).clamp(min=1)).sqrt() + eps)
    return torch.where(flat, 0.0, centred).float()


def leave_one_out(
    rewards: Tensor,  # [B]
    prompt_ids: Tensor,  # [B] int64
) -> Tensor:
    """A_i = r_i - mean of the other rewards of the group = n / (n - 1) (r_i - mean(r)): `[B]`.

    RLOO: Kool et al. 2019; Ahmadian et al., "Back to Basics", arXiv 2402.14740. A group of one, or
    with equal rewards only, has advantages of exactly 0. Raises the errors of `group_advantages`.
    """
    centred, counts, flat = _centred(rewards, prompt_ids)
    scaled = centred * counts / (counts - 1).clamp(min=1)
    return torch.where(flat, 0.0, scaled).float()


def rewards_to_go(
    rewards: Tensor,  # [B]
    token_kl: Tensor,  # [T] estimates of the KL to the reference, without gradient
    lengths: Tensor,  # [B] int64 tokens per row
    loss_mask: Tensor,  # [T] bool: response tokens
    *,
    kl_coef: float,
    turn_rewards: Tensor | None = None,  # [T] a turn's reward at its last token, else 0
) -> Tensor:
    """A_t = r - kl_coef * sum of kl_i for i >= t, and the rewards of turns that end at t or later;
    0 outside the mask: float32 `[T]`.

    REINFORCE++: Hu et al. 2025, arXiv 2501.03262, section 3. The caller whitens it with the moments
    of all response tokens of the batch, over all ranks. Raises as `token_rewards` and `gae` do.
    """
    per_token = token_rewards(
        rewards, token_kl, lengths, loss_mask, kl_coef=kl_coef, turn_rewards=turn_rewards
    )
    zeros = torch.zeros_like(per_token)
    return gae(per_token, zeros, lengths, loss_mask, gamma=1.0, lam=1.0)[0]


def broadcast_to_tokens(
    values: Tensor,  # [B]
    lengths: Tensor,  # [B] int64
    loss_mask: Tensor | None = None,  # [T] bool
) -> Tensor:
    """Each row's value on every one of its tokens, 0 where `loss_mask` is False: `[T]`."""
    tokens = torch.repeat_interleave(values, lengths)
    return tokens if loss_mask is None else torch.where(loss_mask, tokens, 0)


def group_spread(
    rewards: Tensor,  # [B]
    prompt_ids: Tensor,  # [B] int64
) -> tuple[Tensor, Tensor]:
    """Smallest and largest reward of every group, in order of first appearance: `[G]` each.

    Raises:
        ValueError: shapes differ, or a reward is not finite (its rows are named).
    """
    if rewards.dim() != 1 or rewards.shape != prompt_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and prompt_ids {tuple(prompt_ids.shape)} must both "
            "be [B]"
        )
    if not bool(torch.isfinite(rewards).all()):
        bad = torch.nonzero(~torch.isfinite(rewards)).flatten().tolist()
        raise ValueError(f"rewards of rows {bad[:8]} are not finite: drop these rows before")
    index, num_groups = group_index(prompt_ids)
    empty = rewards.new_zeros(num_groups)
    low = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
    return low, empty.scatter_reduce(0, index, rewards, "amax", include_self=False)


def _centred(rewards: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards minus their group's mean, group sizes, whether the group is flat: `[B]` each.

    Computed in float64, so that the order of a group's rows does not affect the float32 result.
    Flat groups are found by comparing rewards: their rounded mean differs from them slightly, which
    the division by a tiny deviation would turn into noise.
    """
    low, high = group_spread(rewards, prompt_ids)
    index, num_groups = group_index(prompt_ids)
    values = rewards.double()
    zeros = values.new_zeros(num_groups)
    counts = zeros.index_add(0, index, torch.ones_like(values))
    means = zeros.index_add(0, index, values) / counts
    return values - means[index], counts[index], (low == high)[index]


def whiten(
    values: Tensor,  # [N]
    mean: float,
    std: float,
    *,
    shift_mean: bool,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(std^2 + eps), plus the mean again without `shift_mean`: float32 `[N]`.

    The code of Ziegler et al. 2019 (arXiv 1909.08593) does the same: advantages are shifted,
    rewards are only scaled about their mean. `mean` and `std` (the population's) must be those of
    all tokens or rows of the world, so that no result depends on the distribution of rows over
    ranks. Float64 values stay float64.

    Raises:
        ValueError: mean or std is not finite, or std is negative.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std >= 0):
        raise ValueError(f"mean={mean}, std={std}: both must be finite, and std not negative")
    scaled = (values.double() - mean) / math.sqrt(std * std + eps)
    return (scaled if shift_mean else scaled + mean).to(at_least_float32(values).dtype)
