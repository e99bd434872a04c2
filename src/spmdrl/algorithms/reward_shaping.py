"""Rewards per token for PPO-RLHF, made from one score per response."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from spmdrl.algorithms.kl import at_least_float32
from spmdrl.algorithms.packed import check_columns, last_tokens

# A deviation below this share of the mean is rounding error of equal scores.
ROUNDING = 1e-12


def token_rewards(
    scores: Tensor,  # [B]
    token_kl: Tensor,  # [T] estimates of `kl`, without gradient
    lengths: Tensor,  # [B] int64 tokens per row
    loss_mask: Tensor,  # [T] bool: response tokens
    *,
    kl_coef: float,
    turn_rewards: Tensor | None = None,  # [T] a turn's reward at its last token, else 0
) -> Tensor:
    """r_t = -kl_coef kl_t, plus the row's score at its last response token, and the rewards of its
    turns at theirs: float32 `[T]`.

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2; InstructGPT, arXiv 2203.02155, eq. 2. Tokens
    outside the mask get 0, and the score of a row without response tokens is dropped. Use k1: with
    gamma = 1 the rewards to go are then unbiased estimates of the KL-regularised return.

    Raises:
        ValueError: shapes differ, or kl_coef is negative or not finite.
    """
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef={kl_coef}: it must be finite and not negative")
    check_columns(lengths, loss_mask, token_kl=token_kl)
    if scores.shape != lengths.shape:
        raise ValueError(f"scores {tuple(scores.shape)} must be {tuple(lengths.shape)}")
    rewards = torch.where(loss_mask, -kl_coef * token_kl.double(), 0.0)
    if turn_rewards is not None:
        check_columns(lengths, loss_mask, turn_rewards=turn_rewards)
        rewards = rewards + torch.where(loss_mask, turn_rewards.double(), 0.0)
    rows, places = last_tokens(lengths, loss_mask)
    return rewards.index_add(0, places, scores[rows].double()).float()


def missing_eos_penalty(
    scores: Tensor,  # [B]
    cut: Tensor,  # [B] bool: the response was cut before its end-of-text token
    *,
    penalty: float,
) -> Tensor:
    """Scores minus `penalty` for cut responses, like TRL's `missing_eos_penalty`: `[B]`.

    Raises:
        ValueError: the penalty is negative or not finite.
    """
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"algorithm.cut_penalty={penalty}: it must be finite and not negative")
    scores = at_least_float32(scores)
    return torch.where(cut, scores - penalty, scores)


def scale_and_clip(
    scores: Tensor,  # [B]
    *,
    scale: float,
    clip: float | None,
) -> Tensor:
    """scale * score, then clipped to [-clip, clip] unless `clip` is None: `[B]`.

    Zheng et al. 2023, "Secrets of RLHF in Large Language Models Part I: PPO", arXiv 2307.04964,
    "reward normalization and clipping", without the shift (subtract the mean before, if wanted).

    Raises:
        ValueError: scale or clip is not positive and finite.
    """
    for name, value in (("scale", scale), ("clip", clip)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"reward {name}={value}: it must be positive and finite")
    scaled = at_least_float32(scores) * scale
    return scaled if clip is None else scaled.clamp(-clip, clip)


@dataclass(frozen=True, kw_only=True)
class RewardScaler:
    """Count, mean and (population) standard deviation of all scores so far, over all ranks.

    Raises:
        ValueError: a value is not finite, or count or std is negative.
    """

    count: float = 0.0
    mean: float = 0.0
    std: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.count, self.mean, self.std)):
            raise ValueError(f"{self}: all must be finite")
        if self.count < 0 or self.std < 0:
            raise ValueError(f"{self}: count and std must not be negative")

    @property
    def scale(self) -> float:
        """1 / std, for `scale_and_clip`; 1 while the scores seen so far have no spread."""
        return 1.0 if self.std <= ROUNDING * abs(self.mean) else 1.0 / self.std

    def updated(self, count: float, mean: float, std: float) -> RewardScaler:
        """The scaler after `count` more scores with these moments over the whole world.

        Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", eq. 2.1. Raises the constructor's errors.
        """
        new = RewardScaler(count=count, mean=mean, std=std)
        if new.count == 0 or self.count == 0:
            return self if new.count == 0 else new
        total = self.count + new.count
        share, step = new.count / total, new.mean - self.mean
        within = (1.0 - share) * self.std**2 + share * new.std**2
        variance = within + share * (1.0 - share) * step**2
        return RewardScaler(count=total, mean=self.mean + share * step, std=math.sqrt(variance))

    def state(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> RewardScaler:
        """Rebuild a scaler from its `state()`. ValueError names missing and unknown keys."""
        names = {"count", "mean", "std"}
        if set(state) != names:
            raise ValueError(
                f"the reward scaler's state has the keys {sorted(state)}; it needs {sorted(names)}"
            )
        return cls(**state)
