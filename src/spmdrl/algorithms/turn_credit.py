"""Credit of turns: rewards from a turn on, and advantages of each turn relative to the same turn of
the group's other samples.

A row's turns are the runs of tokens in its loss mask: what was given between two turns is outside
it. Zeng et al. 2025, arXiv 2505.11821, give the turns of GRPO advantages of their own and normalise
the rewards of each place apart, for samples of equally many turns; here a turn's return includes
all later rewards, as in PPO, and samples may have any number of turns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spmdrl.algorithms.packed import check_columns, discounted_sums, row_of_token
from spmdrl.batch import group_index


class TurnTokens(NamedTuple):
    """Turns of packed rows, in the order of their tokens.

    Args:
        of_token: each token's turn, int64 `[T]`; -1 outside the loss mask.
        row: each turn's row, int64 `[K]`.
        number: number of turns before it in its row, int64 `[K]`.
    """

    of_token: Tensor
    row: Tensor
    number: Tensor


def turn_tokens(
    lengths: Tensor,  # [B] int64 tokens per row
    loss_mask: Tensor,  # [T] bool: sampled tokens
) -> TurnTokens:
    """Find the turns of rows."""
    check_columns(lengths, loss_mask)
    row = row_of_token(lengths)
    follows = torch.zeros_like(loss_mask)  # whether the token before is of the same turn
    follows[1:] = loss_mask[:-1] & (row[1:] == row[:-1])
    starts = loss_mask & ~follows
    of_token = torch.where(loss_mask, starts.long().cumsum(0) - 1, -1)
    turn_row = row[starts]
    before = torch.searchsorted(turn_row, turn_row)  # turns of earlier rows
    return TurnTokens(of_token, turn_row, torch.arange(len(turn_row)) - before)


def turn_returns(
    turns: TurnTokens,
    turn_rewards: Tensor,  # [T] a turn's reward at its last token, else 0
    end_rewards: Tensor,  # [B] rewards of whole rows
) -> Tensor:
    """Sum each turn's reward, those after it in its row, and the row's own: float64 `[K]`."""
    count = len(turns.row)
    live = turns.of_token >= 0
    own = torch.zeros(count, dtype=torch.float64)
    own.index_add_(0, turns.of_token[live], turn_rewards[live].double())
    last = torch.searchsorted(turns.row, turns.row, right=True) - 1
    left = last - torch.arange(count)
    return discounted_sums(own, left, 1.0) + end_rewards.double()[turns.row]


def turn_advantages(
    returns: Tensor,  # [K] from `turn_returns`
    turns: TurnTokens,
    rewards: Tensor,  # [B] of whole rows, those of turns included
    prompt_ids: Tensor,  # [B] int64: equal for the samples of one prompt
    *,
    std: bool = False,
    leave_one_out: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """A_ik = R_ik - mean over the group's samples that have a turn k, on each token of the turn:
    float32 `[T]`, 0 outside the loss mask.

    With `std` it is divided by the deviation (n - 1) of the group's `rewards` + eps, as
    `group_advantages` does; a group whose rewards are all equal then has advantages of exactly 0.
    With `leave_one_out` the mean is that of the other samples (RLOO). A turn k that one sample
    alone has, or whose returns are all equal, has an advantage of exactly 0.

    Raises:
        ValueError: a return is not finite (its rows are named).
    """
    if not bool(torch.isfinite(returns).all()):
        bad = sorted(set(turns.row[~torch.isfinite(returns)].tolist()))
        raise ValueError(f"rewards of rows {bad[:8]} are not finite: drop these rows before")
    group, num_groups = group_index(prompt_ids)
    most = int(turns.number.max()) + 1 if len(turns.number) else 1
    place = group[turns.row] * most + turns.number  # the same turn of one group
    zeros = returns.new_zeros(num_groups * most)
    counts = zeros.index_add(0, place, torch.ones_like(returns))[place]
    centred = returns - zeros.index_add(0, place, returns)[place] / counts
    low = zeros.scatter_reduce(0, place, returns, "amin", include_self=False)
    high = zeros.scatter_reduce(0, place, returns, "amax", include_self=False)
    flat = (low == high)[place]
    if leave_one_out:
        centred = centred * counts / (counts - 1).clamp(min=1)
    if std:
        deviation = _deviations(rewards, group, num_groups)[group[turns.row]]
        flat = flat | (deviation == 0)
        centred = centred / (deviation + eps)
    own = torch.where(flat, 0.0, centred).float()
    live = turns.of_token >= 0
    advantages = torch.zeros(len(turns.of_token))
    advantages[live] = own[turns.of_token[live]]
    return advantages


def _deviations(rewards: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Deviations (n - 1) of the groups' rewards, exactly 0 where they are equal: float64 `[G]`."""
    values = rewards.double()
    zeros = values.new_zeros(num_groups)
    counts = zeros.index_add(0, group, torch.ones_like(values))
    centred = values - (zeros.index_add(0, group, values) / counts)[group]
    squares = zeros.index_add(0, group, centred.square())
    low = zeros.scatter_reduce(0, group, values, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, values, "amax", include_self=False)
    return torch.where(low == high, 0.0, (squares / (counts - 1).clamp(min=1)).sqrt())
