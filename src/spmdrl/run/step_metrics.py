"""Metrics of a step, from its parts and from its optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spmdrl.algorithms.metrics import combine, token_means
from spmdrl.run.protocols import Metrics
from spmdrl.training.experts import EXPERT_METRICS
from spmdrl.training.protocol import STEP_METRICS

PER_STEP = (*STEP_METRICS, *EXPERT_METRICS)
"""Metrics of an optimizer step as a whole, not of its tokens."""


def joined(*parts: Metrics) -> Metrics:
    """Join several sets of metrics into one.

    Raises:
        ValueError: two of them have a metric of the same name.
    """
    found: dict[str, float] = {}
    for part in parts:
        taken = sorted(found.keys() & part.keys())
        if taken:
            raise ValueError(
                f"metrics called {taken} come from two parts of the flow (its environment and its "
                "trainer, say), and one would be lost: give one of them another name"
            )
        found |= part
    return found


def update_metrics(records: Sequence[Metrics]) -> Metrics:
    """Metrics of a step from its optimizer steps: token means; plain means of `PER_STEP`."""
    if not records:
        return {"update_tokens": 0.0}
    sums = combine([{k: v for k, v in r.items() if k not in PER_STEP} for r in records])
    whole = {k: sum(r[k] for r in records) / len(records) for k in PER_STEP if k in records[0]}
    means = dict(token_means(sums))
    tokens = means.pop("tokens")
    return {**means, **whole, "update_tokens": tokens}


def sync_metrics(found: Mapping[str, Metrics]) -> Metrics:
    """Join the metrics of the weight syncs, given by the role that receives the weights. If there
    are several, their names get the role's: `sync/ROLE/gb`.
    """
    if len(found) == 1:
        return next(iter(found.values()))
    return {
        name.replace("sync/", f"sync/{role}/", 1): value
        for role, metrics in found.items()
        for name, value in metrics.items()
    }
