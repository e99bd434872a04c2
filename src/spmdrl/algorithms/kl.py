"""Per-token estimators of the KL divergence (the only place that exponentiates a log-ratio), and
the coefficient of the KL penalty in the reward, fixed or steered towards a target.

The source of the estimators is J. Schulman, "Approximating KL Divergence" (2020,
joschu.net/blog/kl-approx.html). Controllers of the coefficient are values: an update returns a new
one, made from numbers that are equal on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from spmdrl.algorithms.packed import check_columns, masked_row_sums
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


# Ziegler et al. 2019, section 2.2: the relative error of the KL is clipped to +-0.2.
ERROR_LIMIT = 0.2


def sequence_kl(
    token_kl: Tensor,  # [T] estimates of `kl`
    lengths: Tensor,  # [B] int64 tokens per row
    loss_mask: Tensor,  # [T] bool: response tokens
) -> Tensor:
    """The KL estimate of each response, in nats: the sum over its tokens, float32 `[B]`.

    Its mean over the rows of the world is the input of `AdaptiveKl` (use k1 or k3: k2 is biased).

    Raises:
        ValueError: shapes differ.
    """
    check_columns(lengths, loss_mask, token_kl=token_kl)
    return masked_row_sums(token_kl, lengths, loss_mask).float()


@dataclass(frozen=True, kw_only=True)
class FixedKl:
    """A coefficient that never changes.

    Raises:
        ValueError: coef is negative or not finite.
    """

    coef: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(f"kl coef={self.coef}: it must be finite and not negative")

    def updated(self, kl_mean: float, num_samples: int) -> FixedKl:
        return self

    def state(self) -> dict[str, float]:
        """An empty state: the coefficient comes from the configuration."""
        return {}

    def restored(self, state: Mapping[str, float]) -> FixedKl:
        """This controller; raises ValueError for the state of another kind of controller."""
        _check_state(state, set(), "fixed")
        return self


@dataclass(frozen=True, kw_only=True)
class AdaptiveKl:
    """A coefficient that changes in proportion to the KL's distance from its target.

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2: e = clip(KL / target - 1, -0.2, 0.2),
    coef <- coef (1 + K e). K is n / horizon after n samples, as in the paper's code; the paper has
    K = 0.1.

    Args:
        coef: coefficient at the start; it must be positive, because a product never leaves 0.
        target: mean KL of a whole response (`sequence_kl`), in nats.
        horizon: samples over which the coefficient can change by a factor of about 1.2.

    Raises:
        ValueError: an argument is not positive and finite.
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        given = {"coef": self.coef, "target": self.target, "horizon": self.horizon}
        for name, value in given.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"kl {name}={value}: it must be positive and finite")

    def updated(self, kl_mean: float, num_samples: int) -> AdaptiveKl:
        """The controller after `num_samples` responses of mean KL `kl_mean` over all ranks.

        Raises:
            ValueError: kl_mean is not finite, num_samples is negative, or too many for the horizon:
                the coefficient could fall to 0 or below.
        """
        if not math.isfinite(kl_mean):
            raise ValueError(f"the mean KL is {kl_mean}: the KL coefficient cannot follow it")
        if not 0 <= ERROR_LIMIT * num_samples < self.horizon:
            raise ValueError(
                f"num_samples={num_samples} with kl horizon={self.horizon}: it must not be "
                f"negative, and the horizon must be above {ERROR_LIMIT} of it"
            )
        error = min(max(kl_mean / self.target - 1.0, -ERROR_LIMIT), ERROR_LIMIT)
        return replace(self, coef=self.coef * (1.0 + error * num_samples / self.horizon))

    def state(self) -> dict[str, float]:
        return {"coef": self.coef}

    def restored(self, state: Mapping[str, float]) -> AdaptiveKl:
        """This target and horizon with the coefficient of `state()`.

        Raises:
            ValueError: the state of another controller.
        """
        _check_state(state, {"coef"}, "adaptive")
        return replace(self, coef=state["coef"])


KlControl = FixedKl | AdaptiveKl


def _check_state(state: Mapping[str, float], names: set[str], kind: str) -> None:
    if set(state) != names:
        raise ValueError(
            f"the checkpoint's KL control has the state {sorted(state)}, the {kind} one needs "
            f"{sorted(names)}: resume with the kind of control that the checkpoint was saved with"
        )
