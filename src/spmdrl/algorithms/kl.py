"""Per-token estimators of the KL divergence, and the only place that exponentiates a log-ratio.

The source is J. Schulman, "Approximating KL Divergence" (2020, joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from spmdrl.config.algorithms import KlEstimator

# exp(20) = 4.9e8: far beyond any ratio that carries signal, far below what overflows float32.
LOG_RATIO_LIMIT = 20.0


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or unchanged if they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def probability_ratio(
    logprobs: Tensor,  # [...]
    base_logprobs: Tensor,  # [...]
) -> Tensor:
    """exp(logprobs - base_logprobs), log-ratio clamped to +-20, no gradient beyond: `[...]`."""
    return exp_ratio(at_least_float32(logprobs) - at_least_float32(base_logprobs))


def exp_ratio(log_ratio: Tensor) -> Tensor:  # [...]
    """exp of a log-ratio clamped to +-20, no gradient beyond: `[...]`."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def kl(
    logprobs: Tensor,  # [...], of tokens drawn from this distribution
    ref_logprobs: Tensor,  # [...], of the same tokens under the reference
    estimator: KlEstimator,
) -> Tensor:
    """Estimates of KL(p || ref) per token from samples of p, with the plain gradient: `[...]`.

    With d = log p - log ref (Schulman's log(1/r)): k1 = d (unbiased, may be negative);
    k2 = d^2 / 2 (biased, low variance); k3 = exp(-d) - 1 + d (unbiased, never negative). In k3, -d
    is clamped from above in both terms: clamping only inside `exp` would turn the gradient's sign.

    Raises:
        ValueError: unknown estimator.
    """
    gap = at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return 0.5 * gap.square()
    if estimator == "k3":
        log_ratio = (-gap).clamp(max=LOG_RATIO_LIMIT)
        # expm1 keeps the small values that exp(x) - 1 - x would lose to rounding
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"KL estimator {estimator!r}: it must be one of {get_args(KlEstimator)}")


def kl_penalty(
    logprobs: Tensor,  # [...], with gradient
    ref_logprobs: Tensor,  # [...]
    estimator: KlEstimator,
) -> Tensor:
    """The KL estimate as a loss term: the value of `kl`, with a gradient that penalises: `[...]`.

    k2 and k3 (DeepSeekMath, arXiv 2402.03300, eq. 4) are differentiated directly. k1's own gradient
    is grad log p, whose expectation is zero; the gradient of its expectation is
    E[k1 grad log p] = E[grad k2], so k1 takes k2's gradient.
    """
    penalty = kl(logprobs, ref_logprobs.detach(), estimator)
    if estimator != "k1":
        return penalty
    surrogate = kl(logprobs, ref_logprobs.detach(), "k2")
    return penalty.detach() + (surrogate - surrogate.detach())
