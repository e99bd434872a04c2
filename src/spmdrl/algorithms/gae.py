"""Generalised advantage estimation over the response tokens of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.algorithms.packed import check_columns, row_of_token


def gae(
    rewards: Tensor,  # [T]
    values: Tensor,  # [T] V of the state before the token
    lengths: Tensor,  # [B] int64 tokens per row, prompts included
    loss_mask: Tensor,  # [T] bool: response tokens
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, and A_t + V_t.

    Schulman et al. 2016, arXiv 1506.02438, eq. 16. The steps of a row's episode are its tokens in
    the mask, in order. A token between them (a tool's output, the next turn's prompt) is part of
    the state: its reward and value are ignored and it is not discounted. The value after the last
    step is 0, even if the response was cut.

    Returns:
        advantages, returns: float32 `[T]` each, 0 outside the mask.

    Raises:
        ValueError: gamma or lam outside [0, 1], shapes differ, or a reward or value in the mask is
            not finite (its rows are named).
    """
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor}: it must lie in [0, 1]")
    check_columns(lengths, loss_mask, rewards=rewards, values=values)
    steps = loss_mask.nonzero().flatten()
    row = row_of_token(lengths)[steps]
    at_steps = {"rewards": rewards.detach()[steps], "values": values.detach()[steps]}
    for name, column in at_steps.items():
        if not bool(torch.isfinite(column).all()):
            bad = sorted(set(row[~torch.isfinite(column)].tolist()))
            raise ValueError(f"{name} of rows {bad[:8]} are not finite: drop these rows before")
    value = at_steps["values"].double()
    ends = torch.bincount(row, minlength=len(lengths)).cumsum(0)
    left = ends[row] - 1 - torch.arange(len(steps), device=steps.device)
    next_value = torch.where(left > 0, value.roll(-1), 0.0)
    delta = at_steps["rewards"].double() + gamma * next_value - value
    advantage = _discounted_sums(delta, left, gamma * lam)
    advantages, returns = torch.zeros(2, len(loss_mask), device=value.device)
    advantages[steps] = advantage.float()
    returns[steps] = (advantage + value).float()
    return advantages, returns


def _discounted_sums(terms: Tensor, left: Tensor, factor: float) -> Tensor:
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
