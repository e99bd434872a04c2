"""Losses of offline training, as unnormalised sums: next tokens of responses (SFT) and preference
pairs (reward models).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.algorithms.kl import at_least_float32
from spmdrl.algorithms.packed import metric_sums


def next_token_loss(
    logprobs: Tensor,  # [N] of the target tokens, with gradient
    weights: Tensor,  # [N] from `loss_weights`; 0: the token counts nowhere
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of weights * -log p(token), with sums of metrics.

    Metrics (float64 sums over tokens of non-zero weight; see `algorithms.metrics`): tokens, nll
    (nats, without the weights, so that exp of its mean is the perplexity).
    """
    logprobs, weights = at_least_float32(logprobs), at_least_float32(weights)
    return -(weights * logprobs).sum(), metric_sums({"nll": -logprobs}, weights != 0)


def bradley_terry_loss(
    scores: Tensor,  # [R] of the reward model, with gradient
    chosen: Tensor,  # [R] bool: the preferred response of its pair
    pair: Tensor,  # [R] int64: equal for the two rows of a pair
    *,
    margin: Tensor | None = None,  # [R], equal for both rows of a pair
    weights: Tensor | None = None,  # [R], equal for both rows of a pair; 0: it counts nowhere
    centre_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over pairs of w (-log sigmoid(s_c - s_r - margin) + centre_coef (s_c + s_r)^2), metrics.

    InstructGPT, arXiv 2203.02155, eq. 1; the margin is Llama 2's, arXiv 2307.09288, eq. 2. A shift
    of all scores of a prompt does not change the first term; the second term centres them on 0
    (Eisenstein et al. 2023, arXiv 2312.09244; TRL's `center_rewards_coefficient`). Rows may be in
    any order, but both rows of a pair must be given.

    Metrics (float64 sums over pairs of non-zero weight; see `algorithms.metrics`): tokens (the
    number of PAIRS, which means are divided by), accuracy (s_c > s_r), margin (s_c - s_r),
    score_chosen, score_rejected.

    Raises:
        ValueError: a pair is not one chosen and one rejected row, or its rows differ in margin or
            weight; shapes differ; centre_coef is negative or not finite.
    """
    if not (math.isfinite(centre_coef) and centre_coef >= 0):
        raise ValueError(f"centre_coef={centre_coef}: it must be finite and not negative")
    scores = at_least_float32(scores)
    weights = torch.ones_like(scores.detach()) if weights is None else weights
    margin = torch.zeros_like(scores.detach()) if margin is None else margin
    for name, column in {
        "chosen": chosen,
        "pair": pair,
        "margin": margin,
        "weights": weights,
    }.items():
        if column.shape != scores.shape or scores.dim() != 1:
            raise ValueError(
                f"{name} {tuple(column.shape)} and scores {tuple(scores.shape)} must both be [R]"
            )
    better, worse = _pair_rows(chosen, pair)
    pair_margin = _of_pair("margin", margin, better, worse, pair)
    weight = at_least_float32(_of_pair("weights", weights, better, worse, pair))
    gap = scores[better] - scores[worse]
    loss = -F.logsigmoid(gap - at_least_float32(pair_margin))
    if centre_coef:
        loss = loss + centre_coef * (scores[better] + scores[worse]).square()
    metrics = {
        "accuracy": gap > 0,
        "margin": gap,
        "score_chosen": scores[better],
        "score_rejected": scores[worse],
    }
    return (weight * loss).sum(), metric_sums(metrics, weight != 0)


def _pair_rows(chosen: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair's chosen and rejected row, in order of the pairs' ids: int64 `[P]` each."""
    if chosen.dtype != torch.bool:
        raise ValueError(f"chosen is {chosen.dtype}: it must be bool")
    ids, index, counts = torch.unique(pair, return_inverse=True, return_counts=True)
    num_chosen = torch.zeros_like(counts).index_add(0, index, chosen.long())
    bad = ids[(counts != 2) | (num_chosen != 1)].tolist()
    if bad:
        raise ValueError(
            f"pairs {bad[:8]} are not one chosen and one rejected row: keep the rows of a pair "
            "together (make the pair the atom of the call)"
        )
    order = index.argsort()
    picked = chosen[order]
    return order[picked], order[~picked]


def _of_pair(name: str, column: Tensor, better: Tensor, worse: Tensor, pair: Tensor) -> Tensor:
    """The value that both rows of each pair have: `[P]`."""
    differs = column[better] != column[worse]
    if bool(differs.any()):
        bad = pair[better][differs].tolist()
        raise ValueError(f"{name} differs between the two rows of pairs {bad[:8]}")
    return column[better]
