"""The clipped regression loss of the value model, as an unnormalised sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spmdrl.algorithms.kl import at_least_float32
from spmdrl.algorithms.sums import metric_sums

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
