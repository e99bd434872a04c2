"""Combination of sums of metrics over microbatches, ranks and minibatches; the bins of the
histogram of per-token ratios of train to rollout probability.

A loss function returns float64 sums over its loss tokens, and their number as `tokens`. Names that
end in `_max` are maxima of values >= 0 (so a rank without tokens gives 0) and combine by maximum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

TOKENS = "tokens"
MAX_SUFFIX = "_max"


def is_max(name: str) -> bool:
    """Whether a metric combines by maximum instead of by sum."""
    return name.endswith(MAX_SUFFIX)


def combine(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of all parts together: sums, and maxima where the name ends in `_max`."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif is_max(name):
                total[name] = max(total[name], value)
            else:
                total[name] += value
    return total


def token_means(
    sums: Mapping[str, float], *, keep: tuple[str, ...] = ("loss",)
) -> dict[str, float]:
    """Sums divided by `sums["tokens"]`; maxima, `tokens` and the names in `keep` as they are.

    Raises:
        ValueError: `tokens` is missing, or 0.
    """
    if TOKENS not in sums:
        raise ValueError(
            f"a loss's metrics are {sorted(sums)}: they need {TOKENS!r}, the number of loss "
            "tokens, by which the other sums are divided"
        )
    num_tokens = sums[TOKENS]
    if num_tokens <= 0:
        raise ValueError(f"no mean over {num_tokens} loss tokens; metrics given: {sorted(sums)}")
    whole = {TOKENS, *keep}
    return {
        name: value if name in whole or is_max(name) else value / num_tokens
        for name, value in sums.items()
    }


RATIO_EDGES = (0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, 2.0)
"""Upper edges, each inclusive; one more bin is above the last."""

RATIO_BINS = (*(f"rollout_ratio/to_{edge:g}" for edge in RATIO_EDGES), "rollout_ratio/above")
"""Metric names: the share of tokens in each bin."""
