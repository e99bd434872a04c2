"""The policy-gradient losses of PPO, GRPO, Dr.GRPO, DAPO, GSPO and CISPO, as unnormalised sums.

A token's weight carries the `loss_mean` (`loss_weights`). The caller divides the sum once, by
a count over all ranks (`loss_shares`), so the result does not depend on how the rows were split
into ranks and microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from spmdrl.algorithms.kl import (
    at_least_float32,
    exp_ratio,
    kl,
    kl_penalty,
    probability_ratio,
)
from spmdrl.algorithms.metrics import RATIO_BINS, RATIO_EDGES
from spmdrl.algorithms.packed import masked_row_sums, metric_sums
from spmdrl.config.algorithms import AlgorithmSection, LossMean
from spmdrl.memory.host_copies import to_device

# the token columns that the loss reads if they exist
POLICY_COLUMNS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs")


def clipped_policy_loss(
    logprobs: Tensor,  # [N] of the policy, with gradient
    entropy: Tensor,  # [N]
    columns: Mapping[str, Tensor],  # token columns at the loss tokens, [N] each
    weights: Tensor,  # [N] from `loss_weights`; 0: the token counts nowhere
    algorithm: AlgorithmSection,
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
    `RATIO_EDGES`); with `importance_cap` also tis_weight and tis_truncated.

    Raises:
        ValueError: a needed column, or `row` for gspo, is missing; or an entropy bonus is wanted
            and `entropy` carries no gradient.
    """
    _check_columns(columns, algorithm, row)
    columns = {name: at_least_float32(columns[name]) for name in POLICY_COLUMNS if name in columns}
    logprobs, entropy = at_least_float32(logprobs), at_least_float32(entropy)
    weights, live = at_least_float32(weights), weights != 0
    old = columns.get("old_logprobs", logprobs.detach())
    log_ratio = logprobs - old
    if algorithm.policy_loss == "cispo":
        loss, values = cispo_term(logprobs, log_ratio, columns["advantages"], algorithm)
    elif algorithm.policy_loss == "gspo":
        assert row is not None, "checked above"
        loss, values = gspo_term(log_ratio, columns["advantages"], row, live, algorithm)
    else:
        loss, values = ppo_term(log_ratio, columns["advantages"], algorithm)
    values["kl"] = kl(old, logprobs.detach(), "k3")
    if "rollout_logprobs" in columns:
        # where the old ones are the rollout's own, the gap is the engine's error and, from the
        # second update on, also the policy's change since the rollout
        trained = logprobs.detach() if algorithm.old_logprobs == "rollout" else old
        tis_weight, gaps = _rollout_gap(trained, columns["rollout_logprobs"], algorithm)
        loss, values = loss * tis_weight, values | gaps
    if "ref_logprobs" in columns:
        ref = columns["ref_logprobs"]
        values["ref_kl"] = kl(logprobs.detach(), ref, algorithm.kl_estimator)
        if algorithm.loss_kl_coef:
            loss = loss + algorithm.loss_kl_coef * kl_penalty(logprobs, ref, algorithm.kl_estimator)
    values["entropy"] = entropy.detach()
    if algorithm.entropy_coef:
        if torch.is_grad_enabled() and not entropy.requires_grad:
            raise ValueError("entropy_coef is set, but the entropy carries no gradient")
        loss = loss - algorithm.entropy_coef * entropy
    return (weights * loss).sum(), metric_sums(values, live)


def loss_weights(
    lengths: Tensor,  # [B] int64 tokens per row, prompts included
    loss_mask: Tensor,  # [T] bool: response tokens
    loss_mean: LossMean,
    *,
    max_tokens: int,
) -> Tensor:
    """The weight of every token in the loss sum, 0 outside the mask: float32 `[T]`.

    `token_mean`: 1 (DAPO, arXiv 2503.14476, eq. 12); `sequence_mean`: 1 / response tokens of its
    row (GRPO, DeepSeekMath, arXiv 2402.03300, eq. 3); `fixed_length`: 1 / max_tokens (Dr.GRPO,
    arXiv 2503.20783, section 3.2: a constant instead of the response's length). The caller divides
    the loss sum by the sum of `loss_shares`.

    Raises:
        ValueError: unknown `loss_mean`, or max_tokens < 1 with `fixed_length`.
    """
    _check_mean(loss_mean)
    mask = loss_mask.float()
    if loss_mean == "token_mean":
        return mask
    if loss_mean == "fixed_length":
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: it must be at least 1")
        return mask / max_tokens
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    counts = mask.new_zeros(len(lengths)).index_add(0, row, mask)
    return mask / counts.clamp(min=1.0)[row]


def loss_shares(
    lengths: Tensor,  # [B] int64 tokens per row, prompts included
    loss_mask: Tensor,  # [T] bool: response tokens
    loss_mean: LossMean,
) -> Tensor:
    """Each row's contribution to the number that divides the loss sum: float64 `[B]`.

    The number is summed over all rows of the minibatch on all ranks: tokens in the mask for
    `token_mean`, rows with a token in the mask for the other means. A row that is masked as a whole
    (DAPO's overlong filtering, arXiv 2503.14476, section 3.4) is not counted.

    Raises:
        ValueError: unknown `loss_mean`.
    """
    _check_mean(loss_mean)
    counts = masked_row_sums(torch.ones_like(loss_mask, dtype=torch.float64), lengths, loss_mask)
    return counts if loss_mean == "token_mean" else (counts > 0).double()


def ppo_term(
    log_ratio: Tensor,  # [N] log(policy / old policy), with gradient
    advantages: Tensor,  # [N]
    algorithm: AlgorithmSection,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio A, clip(ratio) A) per token, and its metrics per token: `[N]` each.

    PPO, arXiv 1707.06347, eq. 7; DAPO's clip_high, arXiv 2503.14476, eq. 10; dual clip, arXiv
    1912.09729.
    """
    ratio = exp_ratio(log_ratio)
    clipped = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    term = torch.maximum(-advantages * ratio, -advantages * clipped)
    with torch.no_grad():
        beyond = ((ratio > clipped) & (advantages > 0)) | ((ratio < clipped) & (advantages < 0))
        values = {"clip_fraction": beyond, "ratio": ratio}
    if algorithm.dual_clip is not None:
        bound = -advantages * algorithm.dual_clip
        bounded = (advantages < 0) & (term > bound)
        values["dual_clip_fraction"] = bounded
        term = torch.where(bounded, bound, term)
    return term, values


def gspo_term(
    log_ratio: Tensor,  # [N] of tokens, with gradient
    advantages: Tensor,  # [N]
    row: Tensor,  # [N] int64, the row of each token
    live: Tensor,  # [N] bool: the tokens that count
    algorithm: AlgorithmSection,
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
    return ppo_term(mean + (log_ratio - log_ratio.detach()), advantages, algorithm)


def cispo_term(
    logprobs: Tensor,  # [N] of the policy, with gradient
    log_ratio: Tensor,  # [N]
    advantages: Tensor,  # [N]
    algorithm: AlgorithmSection,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(clip(ratio)) A log p per token: every token keeps a gradient, and its weight is bounded.

    CISPO, MiniMax-M1, arXiv 2506.13585, section 3.1; clip_low = 1 sets no lower bound, as there.
    """
    ratio = exp_ratio(log_ratio.detach())
    clipped = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    return -clipped * advantages * logprobs, {"clip_fraction": ratio != clipped, "ratio": ratio}


def _rollout_gap(
    trained: Tensor, rollout: Tensor, algorithm: AlgorithmSection
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights of truncated importance sampling (1 without a cap), metrics per token: `[N]` each.

    min(p_train / p_rollout, cap): Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training". After truncated sampling (top-p, top-k) both probabilities are over the
    kept tokens, see `training.support`.
    """
    gap = (trained - rollout).abs()
    ratio = probability_ratio(trained, rollout)
    [edges] = to_device([torch.tensor(RATIO_EDGES)], ratio.device)
    bins = torch.bucketize(ratio.detach(), edges)
    values = {"rollout_gap": gap, "rollout_gap_max": gap}
    values |= {name: bins == i for i, name in enumerate(RATIO_BINS)}
    if algorithm.importance_cap is None:
        return torch.ones_like(gap), values
    weight = ratio.clamp(max=algorithm.importance_cap)
    values |= {"tis_weight": weight, "tis_truncated": ratio > algorithm.importance_cap}
    return weight, values


def _check_columns(
    columns: Mapping[str, Tensor], algorithm: AlgorithmSection, row: Tensor | None
) -> None:
    if algorithm.policy_loss == "gspo" and row is None:
        raise ValueError("policy_loss=gspo needs the row of every token, and there is none")
    needed = {"advantages": "the policy loss"}
    if algorithm.loss_kl_coef:
        needed["ref_logprobs"] = f"kl_coef={algorithm.loss_kl_coef}"
    if algorithm.importance_cap is not None:
        needed["rollout_logprobs"] = f"importance_cap={algorithm.importance_cap}"
    for name, reason in needed.items():
        if name not in columns:
            raise ValueError(f"{reason} needs the column {name!r}; there are {sorted(columns)}")


def _check_mean(loss_mean: str) -> None:
    if loss_mean not in get_args(LossMean):
        raise ValueError(f"loss_mean={loss_mean!r}: it must be one of {get_args(LossMean)}")
