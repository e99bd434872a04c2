"""Parts shared by the preference flows: the loss of a microbatch, and each row's share of it.

A prompt's group of rows is never split. The row column `preference` (larger is better) decides
which of its rows are compared: two rows of one prompt with different preferences are a pair.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spmdrl.algorithms.direct_preference import (
    ordered_pairs,
    preference_loss,
    response_sums,
)
from spmdrl.batch import Batch
from spmdrl.config.algorithms import PreferenceSection
from spmdrl.flows.policy_terms import update_of
from spmdrl.roles.handles import Update
from spmdrl.roles.model_calls import UpdateRecords
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from spmdrl.run.step_report import update_metrics
from spmdrl.training.protocol import LossFn, LossInput

REFERENCE, BASELINE = "ref_sums", "kl_baseline"
"""Row columns, float64: the reference's log-probability of the response, and KTO's z."""

TRAINED = "trained_tokens"
"""Metric of the loss: response tokens (its metric `tokens` counts pairs)."""


def pair_loss(settings: PreferenceSection) -> LossFn:
    """Make the loss of one microbatch: an unnormalised sum over its pairs."""

    def loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        rows = given.rows
        better, worse = ordered_pairs(rows["preference"], rows["prompt_ids"])
        total, metrics = preference_loss(
            response_sums(given["logprobs"], given.row, given.num_rows),
            torch.bincount(given.row, minlength=given.num_rows),
            better,
            worse,
            settings,
            ref_logprobs=rows.get(REFERENCE),
            baseline=rows.get(BASELINE),
        )
        count = torch.full((), len(given.row), dtype=torch.float64, device=given.row.device)
        return total, {**metrics, TRAINED: count}

    return loss


def with_pair_shares(batch: Batch) -> Batch:
    """Add `loss_share`: the number of pairs in which a row is the better one, float64 `[B]`."""
    better, _ = ordered_pairs(batch["preference"], batch["prompt_ids"])
    shares = torch.bincount(better, minlength=len(batch)).double()
    return batch.with_columns(rows={"loss_share": shares})


def pair_update(run: Run, step: int, batch: Batch, *, temperature: float) -> Update:
    """Update of the policy, with its epochs and minibatches, that never splits a prompt's group."""
    columns = tuple(n for n in ("preference", REFERENCE, BASELINE) if n in batch)
    update = update_of(run, "policy", step, columns, temperature=temperature, entropy=False)
    return replace(update, whole_groups=True)


def pair_metrics(records: UpdateRecords) -> Metrics:
    """Metrics of an update with `pair_loss`, whose `tokens` are renamed to the pairs they count."""
    metrics = dict(update_metrics(records))
    pairs = metrics.pop("update_tokens")
    tokens = pairs * metrics.pop(TRAINED, 0.0)  # that metric, like all, is a mean over pairs
    return {**metrics, "pairs": pairs, "update_tokens": tokens}
