"""Whitening with given moments: this module never computes statistics of its values."""

from __future__ import annotations

import math

from torch import Tensor

from spmdrl.algorithms.kl import at_least_float32


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
