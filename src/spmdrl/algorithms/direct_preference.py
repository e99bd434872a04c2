"""Losses that learn from preferences directly, without a reward model, as sums over pairs, and the
choice of pairs among a prompt's samples by their rewards.

A pair is two rows with the same prompt, one of which is preferred. The losses see each row as one
number, the log-probability of its response under the policy and under the reference, so they do not
depend on packing. The caller divides a sum over pairs once, by the number of pairs of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.algorithms.advantages import group_spread
from spmdrl.algorithms.packed import metric_sums
from spmdrl.batch import Batch, group_index
from spmdrl.config.algorithms import PreferenceSection


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """The quantities of each pair that a loss compares: float64 `[P]` each.

    Args:
        chosen, rejected: the responses' log-ratios to the reference (without a reference their
            log-probabilities), per token if the loss normalises.
        baseline: KTO's z; 0 for other losses.
    """

    chosen: Tensor
    rejected: Tensor
    baseline: Tensor

    @property
    def gap(self) -> Tensor:
        return self.chosen - self.rejected


def preference_loss(
    logprobs: Tensor,  # [R] of whole responses under the policy, with gradient
    response_lengths: Tensor,  # [R] int64 tokens
    better: Tensor,  # [P] int64: the row of each pair that is preferred
    worse: Tensor,  # [P] int64: the other one
    settings: PreferenceSection,
    *,
    ref_logprobs: Tensor | None = None,  # [R] under the reference
    baseline: Tensor | None = None,  # [R] KTO's z, from `kto_baseline`
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over pairs of the configured loss plus the NLL term, float64, and sums of metrics.

    The NLL term is `nll_coef` times the chosen response's negative log-likelihood per token (Pang
    et al. 2024, "Iterative Reasoning Preference Optimization", arXiv 2404.19733, eq. 1).

    Metrics (float64 sums over pairs; see `algorithms.metrics`): tokens (the number of PAIRS, which
    means are divided by), accuracy (the chosen response has the larger implicit reward), margin
    (the difference of these rewards), reward_chosen, reward_rejected, nll (the chosen response's
    negative log-likelihood per token).

    Raises:
        ValueError: the loss needs `ref_logprobs` or `baseline` and got none, or shapes differ.
    """
    _check(logprobs, response_lengths, ref_logprobs, baseline, settings)
    wide = logprobs.double()
    ratio = wide
    if settings.needs_reference and ref_logprobs is not None:
        ratio = wide - ref_logprobs.detach().double()
    rewards = implicit_rewards(ratio, response_lengths, settings)
    compared = as_compared(ratio, response_lengths, settings)
    z = torch.zeros_like(wide) if baseline is None else baseline.detach().double()
    pairs = Compared(chosen=compared[better], rejected=compared[worse], baseline=z[better])
    nll = -(wide / response_lengths.clamp(min=1))[better]
    loss = LOSSES[settings.loss](pairs, settings)
    if settings.nll_coef:
        loss = loss + settings.nll_coef * nll
    metrics = {
        "accuracy": rewards[better] > rewards[worse],
        "margin": rewards[better] - rewards[worse],
        "reward_chosen": rewards[better],
        "reward_rejected": rewards[worse],
        "nll": nll,
    }
    live = torch.ones(len(better), dtype=torch.bool, device=better.device)
    return loss.sum(), metric_sums(metrics, live)


def dpo(pairs: Compared, settings: PreferenceSection) -> Tensor:
    """-(1 - e) log sigmoid(beta gap) - e log sigmoid(-beta gap): `[P]`.

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with label smoothing e, cDPO: Mitchell 2023, "A
    note on DPO with noisy preferences and relationship to IPO".
    """
    return _smoothed(settings.beta * pairs.gap, settings.label_smoothing)


def ipo(pairs: Compared, settings: PreferenceSection) -> Tensor:
    """(gap - 1 / (2 beta))^2: `[P]`.

    Azar et al. 2023, arXiv 2310.12036, eq. 17; beta is its tau. The gap is per token by default, as
    in the authors' results (TRL, `DPOTrainer`).
    """
    return (pairs.gap - 1 / (2 * settings.beta)).square()


def simpo(pairs: Compared, settings: PreferenceSection) -> Tensor:
    """-log sigmoid(beta gap - margin), gap of log-probabilities per token, no reference: `[P]`.

    Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """
    return _smoothed(settings.beta * pairs.gap - settings.margin, settings.label_smoothing)


def kto(pairs: Compared, settings: PreferenceSection) -> Tensor:
    """The mean of w_c (1 - sigmoid(beta (r_c - z))) and w_r (1 - sigmoid(beta (z - r_r))): `[P]`.

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1: each response is judged by itself against
    z, the KL of the policy to the reference. The mean over pairs is the mean over responses.
    """
    good, bad = settings.kto_weights
    chosen = 1 - torch.sigmoid(settings.beta * (pairs.chosen - pairs.baseline))
    rejected = 1 - torch.sigmoid(settings.beta * (pairs.baseline - pairs.rejected))
    return (good * chosen + bad * rejected) / 2


def orpo(pairs: Compared, settings: PreferenceSection) -> Tensor:
    """-log p_c - beta log sigmoid(log odds(p_c) - log odds(p_r)), p the mean probability: `[P]`.

    Hong et al. 2024, arXiv 2403.07691, eqs. 6 and 7; odds(p) = p / (1 - p).
    """
    odds = pairs.gap - (_log1mexp(pairs.chosen) - _log1mexp(pairs.rejected))
    return -pairs.chosen - settings.beta * F.logsigmoid(odds)


LOSSES: Mapping[str, Callable[[Compared, PreferenceSection], Tensor]] = MappingProxyType(
    {"dpo": dpo, "ipo": ipo, "simpo": simpo, "kto": kto, "orpo": orpo}
)


def as_compared(
    ratio: Tensor,  # [R] log-ratio to the reference, or log-probability without one
    response_lengths: Tensor,  # [R] int64 tokens
    settings: PreferenceSection,
) -> Tensor:
    """The number that a loss compares per response, in nats; per token if it normalises: `[R]`."""
    return ratio / response_lengths.clamp(min=1) if settings.normalises else ratio


def implicit_rewards(
    ratio: Tensor,  # [R] log-ratio to the reference, or log-probability without one
    response_lengths: Tensor,  # [R]
    settings: PreferenceSection,
) -> Tensor:
    """The implicit reward of each response under the policy, without gradient: `[R]`.

    beta log(policy / reference) (DPO, arXiv 2305.18290, eq. 5), even if the loss compares it per
    token; for SimPO and ORPO, beta times the log-probability per token.
    """
    own = ratio.detach()
    return settings.beta * (
        own if settings.needs_reference else own / response_lengths.clamp(min=1)
    )


def kto_baseline(mean_compared: float) -> float:
    """KTO's z: the mean over responses to other prompts of the compared number, at least 0.

    arXiv 2402.01306, section 4.1. z is subtracted from the log-ratios of `as_compared`, so it has
    their unit: nats per response, or per token. The mean is taken over the world, so that no result
    depends on the distribution of rows over ranks.
    """
    return max(0.0, mean_compared)


def ordered_pairs(
    preference: Tensor,  # [R] larger is better
    prompt_ids: Tensor,  # [R] int64
) -> tuple[Tensor, Tensor]:
    """All (better, worse) rows of one prompt whose preferences differ: int64 `[P]` each."""
    order = torch.argsort(prompt_ids, stable=True)
    _, sizes = torch.unique_consecutive(prompt_ids[order], return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    # every row against all rows of its prompt: sizes^2 of them
    partners = sizes.repeat_interleave(sizes)
    left = torch.arange(len(order), device=order.device).repeat_interleave(partners)
    ends = partners.cumsum(0)
    within = torch.arange(len(left), device=order.device) - (ends - partners)[left]
    better, worse = order[left], order[starts[left] + within]
    ordered = preference[better] > preference[worse]
    return better[ordered], worse[ordered]


def response_sums(
    values: Tensor,  # [N] at response tokens
    row: Tensor,  # [N] int64, the row of each
    num_rows: int,
) -> Tensor:
    """The sum over each row's tokens, in float64, differentiable: `[num_rows]`."""
    wide = values.double()
    return wide.new_zeros(num_rows).index_add(0, row, wide)


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    loss = -F.logsigmoid(logits)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * F.logsigmoid(-logits)
    return loss


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends (Maechler 2012); x is clamped to -1e-12."""
    x = x.clamp(max=-1e-12)
    near = x > -math.log(2)
    # each branch sees only values where it is finite, so that no NaN flows back through `where`
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, close, far)


def _check(
    logprobs: Tensor,
    response_lengths: Tensor,
    ref_logprobs: Tensor | None,
    baseline: Tensor | None,
    settings: PreferenceSection,
) -> None:
    if settings.needs_reference and ref_logprobs is None:
        raise ValueError(f"loss={settings.loss!r} needs ref_logprobs, and there are none")
    if settings.loss == "kto" and baseline is None:
        raise ValueError("loss='kto' needs a baseline, and there is none")
    columns = {
        "response_lengths": response_lengths,
        "ref_logprobs": ref_logprobs,
        "baseline": baseline,
    }
    for name, column in columns.items():
        if column is not None and (column.shape != logprobs.shape or logprobs.dim() != 1):
            raise ValueError(
                f"{name} {tuple(column.shape)} and logprobs {tuple(logprobs.shape)} must both be "
                "[R]"
            )


Pairing = Literal["best_worst", "all"]


def pair_rows(
    rewards: Tensor,  # [B]
    prompt_ids: Tensor,  # [B] int64
    usable: Tensor,  # [B] bool: rows that may be compared
    pairing: Pairing,
) -> tuple[Tensor, Tensor]:
    """The rows to compare (int64 `[R]`, ascending), and their preferences (float64 `[R]`).

    Two rows of a prompt form a pair if their preferences differ; the larger one is better.
    `best_worst`: per prompt, the row with the largest and the row with the smallest reward, the
    first of equal ones (Guo et al. 2024, arXiv 2402.04792, has two samples and so this pair).
    `all`: every row, with its reward as preference. Prompts with equal rewards only have no pair.

    Raises:
        ValueError: shapes differ, or a reward is not finite (its rows are named).
    """
    rows = usable.nonzero().flatten()
    values, ids = rewards[rows].double(), prompt_ids[rows]
    low, high = group_spread(values, ids)
    index, num_groups = group_index(ids)
    alive = (low != high)[index]
    if pairing == "all":
        return rows[alive], values[alive]
    best, worst = (
        _first(values == bound[index], index, num_groups) & alive for bound in (high, low)
    )
    chosen = best | worst
    return rows[chosen], best[chosen].double()


def distinct_responses(batch: Batch) -> Tensor:
    """Mask of rows whose response differs from those of earlier rows of their prompt: bool `[B]`.

    Of equal responses none is preferable, and a reward model's scores of them may differ by
    rounding.
    """
    seen: set[tuple[int, bytes]] = set()
    fresh = []
    parts = torch.split(batch["tokens"], batch.lengths.tolist())
    for tokens, prompt_id, start in zip(
        parts, batch["prompt_ids"].tolist(), batch["prompt_lengths"].tolist(), strict=True
    ):
        key = (prompt_id, tokens[start:].numpy().tobytes())
        fresh.append(key not in seen)
        seen.add(key)
    return torch.tensor(fresh, dtype=torch.bool)


def _first(flags: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """The first row of each group whose flag is set: bool `[R]`."""
    places = torch.arange(len(flags), device=flags.device)
    none = torch.full((num_groups,), len(flags), device=flags.device)
    first = none.scatter_reduce(0, index[flags], places[flags], "amin")
    return flags & (first[index] == places)
