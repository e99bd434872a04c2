"""The policy-gradient losses of PPO, GRPO, Dr.GRPO, DAPO, GSPO and CISPO, as unnormalised sums.

A token's weight carries the aggregation mode (`loss_weights`). The caller divides the sum once, by
a count over all ranks (`loss_shares`), so the result does not depend on how the rows were split
into ranks and microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spmdrl.algorithms.kl import (
    KlEstimator,
    at_least_float32,
    exp_ratio,
    kl,
    kl_penalty,
    probability_ratio,
)
from spmdrl.algorithms.packed import masked_row_sums
from spmdrl.algorithms.ratio_bins import RATIO_BINS, RATIO_EDGES
from spmdrl.algorithms.sums import metric_sums

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]
Objective = Literal["ppo", "gspo", "cispo"]

# the token columns that the loss reads if they exist
POLICY_COLUMNS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The terms of the policy loss.

    Args:
        objective: see `ppo_term`, `gspo_term` and `cispo_term`.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; PPO 0.2 / 0.2
            (arXiv 1707.06347, eq. 7), DAPO 0.2 / 0.28 (arXiv 2503.14476, eq. 10).
        dual_clip: c > 1 bounds the loss of a token with negative advantage by c |A| (dual-clip
            PPO, Ye et al., arXiv 1912.09729); None sets no bound.
        kl_coefficient, kl_estimator: KL to `ref_logprobs` as a term of the loss; 0 omits it.
        tis_cap: truncated importance sampling, min(p_train / p_rollout, cap) on the policy term
            (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
            Training"); None omits it. After truncated sampling (top-p, top-k) both
            probabilities are over the kept tokens, see `training.support`.
        entropy_coefficient: weight of the entropy bonus; 0 omits it.
        old_is_rollout: `old_logprobs` are the rollout's own, so the gap between rollout and trainer
            is measured on `logprobs`: it is the engine's error and, from the second update on, also
            the policy's change since the rollout.

    Raises:
        ValueError: a value is out of its range, or `tis_cap` would correct nothing; it is named.
    """

    objective: Objective = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: KlEstimator = "k3"
    tis_cap: float | None = None
    entropy_coefficient: float = 0.0
    old_is_rollout: bool = False

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"objective={self.objective!r}: it must be one of {get_args(Objective)}"
            )
        if self.objective == "cispo" and self.dual_clip is not None:
            raise ValueError(
                f"dual_clip={self.dual_clip} with objective='cispo': there is nothing to bound, "
                "set it to none"
            )
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low}: it must lie in [0, 1]")
        if self.clip_high < 0:
            raise ValueError(f"clip_high={self.clip_high}: it must not be negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip}: it must be above 1, or none")
        if self.kl_coefficient < 0:
            raise ValueError(f"kl_coefficient={self.kl_coefficient}: it must not be negative")
        if self.kl_estimator not in get_args(KlEstimator):
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r}: it must be one of {get_args(KlEstimator)}"
            )
        if self.tis_cap is not None and self.tis_cap <= 0:
            raise ValueError(f"tis_cap={self.tis_cap}: it must be positive, or none")
        if self.tis_cap is not None and self.old_is_rollout:
            raise ValueError(f"tis_cap={self.tis_cap} with old_is_rollout: all weights would be 1")


def clipped_policy_loss(
    logprobs: Tensor,  # [N] of the policy, with gradient
    entropy: Tensor,  # [N]
    columns: Mapping[str, Tensor],  # token columns at the loss tokens, [N] each
    weights: Tensor,  # [N] from `loss_weights`; 0: the token counts nowhere
    config: PolicyLossConfig,
    row: Tensor | None = None,  # [N] int64, the row of each token; gspo needs it
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of weights * (policy term + KL term - entropy bonus), and sums of metrics.

    Columns: `advantages` (required); `old_logprobs` (if absent, `logprobs.detach()` replaces it:
    on-policy, one update per rollout); `ref_logprobs` (required for the KL term);
    `rollout_logprobs` (required for truncated importance sampling).

    Metrics (float64 scalars, sums over tokens of non-zero weight; see `algorithms.metrics`):
    tokens, clip_fraction, kl (k3 of KL(old || new)), entropy, ratio; dual_clip_fraction with
    `dual_clip`; ref_kl (by `kl_estimator`) with `ref_logprobs`. With `rollout_logprobs`:
    rollout_gap and rollout_gap_max (absolute difference of train and rollout logprobs) and the
    histogram rollout_ratio/... (tokens per bin of the ratio of train to rollout probability, see
    `RATIO_EDGES`); with `tis_cap` also tis_weight and tis_truncated.

    Raises:
        ValueError: a needed column, or `row` for gspo, is missing; or an entropy bonus is wanted
            and `entropy` carries no gradient.
    """
    _check_columns(columns, config, row)
    columns = {name: at_least_float32(columns[name]) for name in POLICY_COLUMNS if name in columns}
    logprobs, entropy = at_least_float32(logprobs), at_least_float32(entropy)
    weights, live = at_least_float32(weights), weights != 0
    old = columns.get("old_logprobs", logprobs.detach())
    log_ratio = logprobs - old
    if config.objective == "cispo":
        loss, values = cispo_term(logprobs, log_ratio, columns["advantages"], config)
    elif config.objective == "gspo":
        assert row is not None, "checked above"
        loss, values = gspo_term(log_ratio, columns["advantages"], row, live, config)
    else:
        loss, values = ppo_term(log_ratio, columns["advantages"], config)
    values["kl"] = kl(old, logprobs.detach(), "k3")
    if "rollout_logprobs" in columns:
        trained = logprobs.detach() if config.old_is_rollout else old
        tis_weight, gaps = _rollout_gap(trained, columns["rollout_logprobs"], config)
        loss, values = loss * tis_weight, values | gaps
    if "ref_logprobs" in columns:
        ref = columns["ref_logprobs"]
        values["ref_kl"] = kl(logprobs.detach(), ref, config.kl_estimator)
        if config.kl_coefficient:
            loss = loss + config.kl_coefficient * kl_penalty(logprobs, ref, config.kl_estimator)
    values["entropy"] = entropy.detach()
    if config.entropy_coefficient:
        if torch.is_grad_enabled() and not entropy.requires_grad:
            raise ValueError("entropy_coefficient is set, but the entropy carries no gradient")
        loss = loss - config.entropy_coefficient * entropy
    return (weights * loss).sum(), metric_sums(values, live)


def loss_weights(
    lengths: Tensor,  # [B] int64 tokens per row, prompts included
    loss_mask: Tensor,  # [T] bool: response tokens
    mode: Aggregation,
    *,
    max_tokens: int,
) -> Tensor:
    """The weight of every token in the loss sum, 0 outside the mask: float32 `[T]`.

    `token_mean`: 1 (DAPO, arXiv 2503.14476, eq. 12); `sequence_mean`: 1 / response tokens of its
    row (GRPO, DeepSeekMath, arXiv 2402.03300, eq. 3); `fixed_length`: 1 / max_tokens (Dr.GRPO,
    arXiv 2503.20783, section 3.2: a constant instead of the response's length). The caller divides
    the loss sum by the sum of `loss_shares`.

    Raises:
        ValueError: unknown mode, or max_tokens < 1 with `fixed_length`.
    """
    _check_mode(mode)
    mask = loss_mask.float()
    if mode == "token_mean":
        return mask
    if mode == "fixed_length":
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: it must be at least 1")
        return mask / max_tokens
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    counts = mask.new_zeros(len(lengths)).index_add(0, row, mask)
    return mask / counts.clamp(min=1.0)[row]


def loss_shares(
    lengths: Tensor,  # [B] int64 tokens per row, prompts included
    loss_mask: Tensor,  # [T] bool: response tokens
    mode: Aggregation,
) -> Tensor:
    """Each row's contribution to the number that divides the loss sum: float64 `[B]`.

    The number is summed over all rows of the minibatch on all ranks: tokens in the mask for
    `token_mean`, rows with a token in the mask for the other modes. A row that is masked as a whole
    (DAPO's overlong filtering, arXiv 2503.14476, section 3.4) is not counted.

    Raises:
        ValueError: unknown mode.
    """
    _check_mode(mode)
    counts = masked_row_sums(torch.ones_like(loss_mask, dtype=torch.float64), lengths, loss_mask)
    return counts if mode == "token_mean" else (counts > 0).double()


def ppo_term(
    log_ratio: Tensor,  # [N] log(policy / old policy), with gradient
    advantages: Tensor,  # [N]
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio A, clip(ratio) A) per token, and its metrics per token: `[N]` each.

    PPO, arXiv 1707.06347, eq. 7; DAPO's clip_high, arXiv 2503.14476, eq. 10; dual clip, arXiv
    1912.09729.
    """
    ratio = exp_ratio(log_ratio)
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    term = torch.maximum(-advantages * ratio, -advantages * clipped)
    with torch.no_grad():
        beyond = ((ratio > clipped) & (advantages > 0)) | ((ratio < clipped) & (advantages < 0))
        values = {"clip_fraction": beyond, "ratio": ratio}
    if config.dual_clip is not None:
        bound = -advantages * config.dual_clip
        bounded = (advantages < 0) & (term > bound)
        values["dual_clip_fraction"] = bounded
        term = torch.where(bounded, bound, term)
    return term, values


def gspo_term(
    log_ratio: Tensor,  # [N] of tokens, with gradient
    advantages: Tensor,  # [N]
    row: Tensor,  # [N] int64, the row of each token
    live: Tensor,  # [N] bool: the tokens that count
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ppo_term` with one ratio for a whole response, the geometric mean of its tokens' ratios.

    GSPO, Zheng et al. 2025, arXiv 2507.18071, in the form of its section 4.3 (GSPO-token), where a
    token's gradient has its own advantage; with one advantage per response and the weights of
    `sequence_mean`, value and gradient are those of section 4.1. The clip range is two orders of
    magnitude smaller than PPO's (3e-4 and 4e-4 there).
    """
    num_rows = int(row.max()) + 1 if len(row) else 0
    kept = torch.where(live, log_ratio.detach(), 0.0).double()
    sums = kept.new_zeros(num_rows).index_add(0, row, kept)
    counts = kept.new_zeros(num_rows).index_add(0, row, live.double())
    mean = (sums / counts.clamp(min=1.0)).to(log_ratio.dtype)[row]
    return ppo_term(mean + (log_ratio - log_ratio.detach()), advantages, config)


def cispo_term(
    logprobs: Tensor,  # [N] of the policy, with gradient
    log_ratio: Tensor,  # [N]
    advantages: Tensor,  # [N]
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(clip(ratio)) A log p per token: every token keeps a gradient, and its weight is bounded.

    CISPO, MiniMax-M1, arXiv 2506.13585, section 3.1; clip_low = 1 sets no lower bound, as there.
    """
    ratio = exp_ratio(log_ratio.detach())
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    return -clipped * advantages * logprobs, {"clip_fraction": ratio != clipped, "ratio": ratio}


def _rollout_gap(
    trained: Tensor, rollout: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of truncated importance sampling (1 without a cap), metrics per token: `[N]` each."""
    gap = (trained - rollout).abs()
    ratio = probability_ratio(trained, rollout)
    bins = torch.bucketize(ratio.detach(), torch.tensor(RATIO_EDGES, device=ratio.device))
    values = {"rollout_gap": gap, "rollout_gap_max": gap}
    values |= {name: bins == i for i, name in enumerate(RATIO_BINS)}
    if config.tis_cap is None:
        return torch.ones_like(gap), values
    weight = ratio.clamp(max=config.tis_cap)
    values |= {"tis_weight": weight, "tis_truncated": ratio > config.tis_cap}
    return weight, values


def _check_columns(
    columns: Mapping[str, Tensor], config: PolicyLossConfig, row: Tensor | None
) -> None:
    if config.objective == "gspo" and row is None:
        raise ValueError("objective='gspo' needs the row of every token, and there is none")
    needed = {"advantages": "the policy loss"}
    if config.kl_coefficient:
        needed["ref_logprobs"] = f"kl_coefficient={config.kl_coefficient}"
    if config.tis_cap is not None:
        needed["rollout_logprobs"] = f"tis_cap={config.tis_cap}"
    for name, reason in needed.items():
        if name not in columns:
            raise ValueError(f"{reason} needs the column {name!r}; there are {sorted(columns)}")


def _check_mode(mode: str) -> None:
    if mode not in get_args(Aggregation):
        raise ValueError(f"aggregation {mode!r}: it must be one of {get_args(Aggregation)}")
