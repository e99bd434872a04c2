"""Metrics as curves: which belong together, what they are, and the points that are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from spmdrl.observe import names

Records = Sequence[Mapping[str, float]]

GROUPS = {
    "Rewards": "reward score shaped_reward groups samples duplicate_fraction advantage accuracy "
    "margin pairs judge",
    "Policy": "kl ref_kl teacher_kl entropy ratio clip_fraction rollout_gap tis rollout_ratio "
    "sample_lag replay_changed",
    "Loss and optimizer": "loss policy_loss nll lr grad_norm skipped no_gradient balance_loss "
    "expert experts",
    "Lengths": "response_length lengths cut_fraction rollout_tokens update_tokens",
    "Value model": "value",
    "Turns": "turns",
    "Held-out sets": "eval",
    "Speed": "seconds tokens_per_s efficiency idle",
    "Memory": "memory",
    "Weight sync": "sync",
}
"""Group -> beginnings of its metrics' names, up to a `_` or `/`, in their order."""

OTHERS = "Other metrics"

TITLES = {
    names.REWARD: "mean reward of a step",
    "reward_std": "standard deviation of rewards",
    "groups_with_signal": "groups whose rewards differ",
    "duplicate_fraction": "share of responses that repeat another of their group",
    "reward_failed": "share of responses on which a reward function failed",
    "score": "mean score of the reward model",
    "margin": "chosen less rejected",
    names.KL: "KL of a step's move, nats per token",
    names.REF_KL: "KL to the reference, nats per token",
    "kl_per_response": "KL to the reference, nats per response",
    names.ENTROPY: "entropy, nats per token",
    "ratio": "mean ratio of new to old probability",
    names.CLIP_FRACTION: "share of clipped tokens",
    "rollout_gap": "engine and trainer: mean difference of log-probabilities, nats",
    "sample_lag": "age of the samples, optimizer steps",
    "loss": "training loss",
    "nll": "training loss, nats per response token",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient before clipping",
    names.LENGTH: "mean response length, tokens",
    "cut_fraction": "share of responses cut at the most tokens",
    "value/explained_variance": "share of the returns' variance that the value model explains",
    names.PEAK_MEMORY: "peak memory of a rank, GB",
    names.PEAK_SUM: "peak memory of all ranks together, GB",
    names.STEP_SECONDS: "seconds of a step",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values of a metric of one run.

    Args:
        run: number of the run among those of the page.
        steps: ascending.
        values: as recorded; they may be infinite or not a number.
        errors: standard errors as recorded, 0 where there is none; None: the metric has none.
    """

    run: int
    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float] | None = None

    def finite(self) -> list[tuple[float, float]]:
        """Points whose values are finite."""
        points = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in points if is_shown(value)]

    def error(self, place: int) -> float:
        """Standard error of the value at a place in `values`; 0 where there is none."""
        error = 0.0 if self.errors is None else self.errors[place]
        return error if is_shown(error) else 0.0


def is_shown(value: float) -> bool:
    """Whether a value is finite, and differences of such values are."""
    return math.isfinite(value) and abs(value) < 1e100


def series_of(records: Records, name: str, run: int = 0) -> Series | None:
    """Make the series of a metric; None: it was not recorded."""
    found = [(record["step"], record[name]) for record in records if name in record]
    if not found:
        return None
    steps, values = zip(*found, strict=True)
    return Series(run=run, steps=steps, values=values)


def grouped(metrics: Iterable[str]) -> dict[str, list[str]]:
    """Sort the names of metrics into groups; groups without any are left out."""
    order: dict[str, list[tuple[int, int, str]]] = {group: [] for group in (*GROUPS, OTHERS)}
    for number, name in enumerate(dict.fromkeys(metrics)):
        group, place = _place(name)
        order[group].append((place, number, name))
    return {group: [name for *_, name in sorted(found)] for group, found in order.items() if found}


def _place(name: str) -> tuple[str, int]:
    """Group of a metric, and its place there: those of the longest beginning."""
    found = [
        (len(known), group, place)
        for group, text in GROUPS.items()
        for place, known in enumerate(text.split())
        if name == known or name.startswith((f"{known}_", f"{known}/"))
    ]
    return max(found)[1:] if found else (OTHERS, 0)


def is_constant(series: Sequence[Series]) -> bool:
    """Whether a metric has one finite value wherever it was recorded."""
    values = {value for own in series for value in own.values}
    return len(values) == 1 and all(map(is_shown, values))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the values; near both ends, over as many as exist."""
    half = len(values) // 20
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in ends]


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Choose the indices of at most about `most` values: of every stretch the smallest and the
    largest, and all ends of gaps, so that no peak is lost; values that are not finite are gaps.
    """
    if len(values) <= most:
        return list(range(len(values)))
    size = math.ceil(2 * len(values) / most)
    kept = {0, len(values) - 1}
    for begin in range(0, len(values), size):
        stretch = range(begin, min(begin + size, len(values)))
        finite = [i for i in stretch if is_shown(values[i])]
        if len(finite) < len(stretch):
            kept.add(next(i for i in stretch if not is_shown(values[i])))
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def text_of(value: float) -> str:
    """Write a number in four digits."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4g}"
