"""Metrics of evaluations as pure functions of scores: pass@k, avg@k and their standard errors; how
often, and by how much, the chosen response of a pair scores higher.

Scores are averaged per prompt first, then over prompts: the samples of one prompt are one cluster
(Miller 2024, "Adding error bars to evals", section 2.2), so the standard error of a mean is that of
the prompts' means.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.reduce import gather_objects
from spmdrl.observe.names import ACCURACY, EVAL, STANDARD_ERROR


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over prompts with its standard error (nan for fewer than two prompts)."""

    mean: float
    standard_error: float
    num_prompts: int


def estimate(values: Tensor) -> Estimate:  # [P], one value per prompt
    """Mean and standard error `sqrt(sum (x - mean)^2 / (P (P - 1)))`, in float64.

    Raises:
        ValueError: there are no prompts.
    """
    count = values.numel()
    if count == 0:
        raise ValueError("no prompts to average over")
    wide = values.to(torch.float64)
    error = float(wide.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(mean=float(wide.mean()), standard_error=error, num_prompts=count)


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Plain mean of values that are independent only between clusters.

    Its standard error is Miller's eq. 4 (from the sums of the deviations within each cluster), its
    variance times G / (G - 1) for G clusters; nan for fewer than two.

    Raises:
        ValueError: there are no values, or not one cluster for each.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values of {len(clusters)} clusters have no mean")
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    count = len(sums)
    if count < 2:
        return Estimate(mean=mean, standard_error=math.nan, num_prompts=count)
    variance = math.fsum(total**2 for total in sums.values()) * count / (count - 1)
    error = math.sqrt(variance) / len(values)
    return Estimate(mean=mean, standard_error=error, num_prompts=count)


def avg_at_k(scores: Tensor) -> Estimate:  # [P, n], the samples of P prompts; bool or number
    """Mean score, with the standard error clustered by prompt.

    Raises:
        ValueError: there are no prompts or no samples.
    """
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be [prompts, samples], not {tuple(scores.shape)}")
    return estimate(scores.to(torch.float64).mean(dim=1))


def win_rate(
    rewards: Tensor,  # [P, n], rewards of n samples of P prompts
    others: Tensor,  # [P, m], rewards of the opponent's m samples of the same prompts
) -> Estimate:
    """Probability that a sample has a higher reward than the opponent's; a tie counts half.

    Every sample meets each of the opponent's for its prompt; the error is clustered by prompt.

    Raises:
        ValueError: the numbers of prompts differ, or there are no prompts or samples.
    """
    if rewards.dim() != 2 or others.dim() != 2 or len(rewards) != len(others):
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and others {tuple(others.shape)} must be [prompts, "
            "samples] of the same prompts"
        )
    gap = rewards.double()[:, :, None] - others.double()[:, None, :]
    return avg_at_k((0.5 * (gap.sign() + 1)).flatten(1))


def pass_at_k(right: Tensor, k: int) -> Estimate:  # bool [P, n], the samples of P prompts
    """Mean over prompts of the probability that one of k samples is right (`unbiased_pass_at_k`).

    Raises:
        ValueError: k is not positive or exceeds the samples drawn, or there are no prompts.
    """
    if right.dim() != 2:
        raise ValueError(f"right must be [prompts, samples], not {tuple(right.shape)}")
    num_samples = torch.full((right.shape[0],), right.shape[1], device=right.device)
    return estimate(unbiased_pass_at_k(num_samples, right.sum(dim=1), k))


def unbiased_pass_at_k(
    num_samples: Tensor,  # int64 [P], samples drawn for each prompt
    num_correct: Tensor,  # int64 [P], right samples among them
    k: int,
) -> Tensor:
    """Unbiased estimate of pass@k for each prompt: float64 `[P]`.

    `1 - C(n - c, k) / C(n, k)`: Chen et al. 2021, "Evaluating large language models trained on
    code", eq. 1, as the product `1 - prod_{i=n-c+1..n} (1 - k / i)`.

    Raises:
        ValueError: k is not positive or exceeds the samples of a prompt; a count is impossible.
    """
    n, c = num_samples.to(torch.float64), num_correct.to(torch.float64)
    if bool((c < 0).any()) or bool((c > n).any()):
        raise ValueError(
            f"of {num_samples.tolist()} samples {num_correct.tolist()} cannot be right"
        )
    if k < 1 or bool((n < k).any()):
        raise ValueError(f"pass@{k} needs 1 <= k <= samples drawn; they are {num_samples.tolist()}")
    width = int(c.max()) if c.numel() else 0
    i = n[:, None] - torch.arange(width, dtype=torch.float64, device=n.device)
    factors = torch.where(i > (n - c)[:, None], 1.0 - k / i.clamp(min=1.0), 1.0)
    # with fewer than k wrong samples, any k samples contain a right one: C(n - c, k) is zero
    return torch.where(n - c < k, 1.0, 1.0 - factors.prod(dim=1))


CHOSEN = 0
"""Value of `sample_index` in a pair's chosen row; the rejected row has 1."""


def pair_accuracy(set_name: str, batch: Batch, scores: Tensor) -> dict[str, float]:
    """Accuracy (a tie counts half) and margin of pairs, with errors clustered by prompt, since
    pairs of one prompt are not independent. Every rank calls it.

    Args:
        batch: home rows of pairs, the two rows of a pair next to each other.
        scores: [B], higher for the better response.
    """
    is_chosen = batch["sample_index"] == CHOSEN
    gap = scores.double()[is_chosen] - scores.double()[~is_chosen]
    prompts = list(batch.objects["prompt_text"][::2])
    own = list(zip(prompts, gap.tolist(), strict=True))
    pairs = [pair for part in gather_objects(own) for pair in part]
    found: dict[str, float] = {}
    for label, values in (
        (ACCURACY, [0.5 * ((gap > 0) + (gap >= 0)) for _, gap in pairs]),
        ("/margin", [gap for _, gap in pairs]),
    ):
        estimate = clustered_mean(values, [prompt for prompt, _ in pairs])
        error = STANDARD_ERROR if label == ACCURACY else label + STANDARD_ERROR
        name = f"{EVAL}{set_name}"
        found |= {name + label: estimate.mean, name + error: estimate.standard_error}
    return found
