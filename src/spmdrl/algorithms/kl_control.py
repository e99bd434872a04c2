"""The coefficient of the KL penalty in the reward, fixed or steered towards a target.

Controllers are values: an update returns a new one, made from numbers that are equal on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from spmdrl.algorithms.packed import check_columns, masked_row_sums

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
