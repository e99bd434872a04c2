"""The clipped regression loss of the value model, as an unnormalised sum, and generalised advantage
estimation over the response tokens of packed rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spmdrl.algorithms.kl import at_least_float32
from spmdrl.algorithms.packed import check_columns, discounted_sums, metric_sums, row_of_token

# the token columns that the value loss reads; `old_values` only for clipping
VALUE_COLUMNS = ("old_values", "returns")


def clipped_value_loss(
    values: Tensor,  # [N] of the value model, with gradient
    columns: Mapping[str, Tensor],  # token columns at the loss tokens, [N] each
    weights: Tensor,  # [N] from `loss_weights`; 0: the token counts nowhere
    clip: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of weights * 0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2), and metrics.

    PPO2 of OpenAI's baselines and the code of Ziegler et al. 2019 (arXiv 1909.08593). `clip=None`
    omits the second term. Columns: `returns` and, for the clip, `old_values` (the values that the
    advantages were computed with).

    Metrics (float64 sums over tokens of non-zero weight; see `algorithms.metrics`): tokens, value,
    value_error ((v - R)^2), returns, returns_sq (R^2, for `explained_variance`);
    value_clip_fraction (the clipped error is the larger one) with `clip`.

    Raises:
        ValueError: a needed column is missing, or clip is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"value clip={clip}: it must be positive, or none")
    for name in VALUE_COLUMNS if clip is not None else ("returns",):
        if name not in columns:
            raise ValueError(
                f"the value loss needs the column {name!r}; there are {sorted(columns)}"
            )
    values, returns = at_least_float32(values), at_least_float32(columns["returns"])
    weights = at_least_float32(weights)
    error = (values - returns).square()
    wide, wide_returns = values.detach().double(), returns.double()
    metrics = {
        "value": wide,
        "value_error": (wide - wide_returns).square(),
        "returns": wide_returns,
        "returns_sq": wide_returns.square(),
    }
    if clip is not None:
        old = at_least_float32(columns["old_values"])
        clipped_error = (values.clamp(old - clip, old + clip) - returns).square()
        metrics["value_clip_fraction"] = clipped_error > error
        error = torch.maximum(error, clipped_error)
    return (weights * (0.5 * error)).sum(), metric_sums(metrics, weights != 0)


def explained_variance(means: Mapping[str, float]) -> float:
    """1 - Var(R - v) / Var(R) from the means (`token_means`) of `clipped_value_loss`'s metrics.

    It is 1 if the values predict the returns, 0 if they do no better than a constant, and negative
    if they do worse. If all returns are equal it is 0, because there is nothing to explain.

    Raises:
        ValueError: a mean is missing.
    """
    needed = ("value", "value_error", "returns", "returns_sq")
    for name in needed:
        if name not in means:
            raise ValueError(f"explained variance needs the mean of {name!r}: {sorted(means)}")
    value, error, returns, returns_sq = (means[name] for name in needed)
    variance = returns_sq - returns**2
    if variance <= 1e-12 * returns_sq:  # rounding error of equal returns
        return 0.0
    return 1.0 - (error - (returns - value) ** 2) / variance


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
    advantage = discounted_sums(delta, left, gamma * lam)
    advantages, returns = torch.zeros(2, len(loss_mask), device=value.device)
    advantages[steps] = advantage.float()
    returns[steps] = (advantage + value).float()
    return advantages, returns
