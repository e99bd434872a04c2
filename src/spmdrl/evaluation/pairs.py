"""Preference pairs: how often, and by how much, the chosen response scores higher."""

from __future__ import annotations

from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.reduce import gather_objects
from spmdrl.evaluation.metrics import clustered_mean
from spmdrl.observe.names import ACCURACY, EVAL, STANDARD_ERROR

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
