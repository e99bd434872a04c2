"""DPO and its variants: train a policy on preference pairs, without samples or a reward model.

Follows Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290): the log-ratio of policy and
reference is the reward, and the loss is the negative Bradley-Terry log-likelihood of the pairs.
`preference.loss` selects IPO, SimPO, KTO or ORPO (`algorithms.direct_preference` names the papers);
`preference.label_smoothing` makes it cDPO. Left out: unpaired data for KTO.
"""

from __future__ import annotations

import torch

from spmdrl.algorithms.direct_preference import as_compared, kto_baseline
from spmdrl.batch import Batch
from spmdrl.config.algorithms import PreferenceSection
from spmdrl.data.item_set import items_of
from spmdrl.data.order import DataSet, StepRows
from spmdrl.data.preferences import Pair, mismatched
from spmdrl.distributed.reduce import moments
from spmdrl.flows.held_out_preferences import HeldOutPreferences, log_ratio
from spmdrl.flows.preference_terms import (
    BASELINE,
    pair_loss,
    pair_metrics,
    pair_update,
    with_pair_shares,
)
from spmdrl.flows.reference_sums import AskedSums, CachedSums, ReferenceSums
from spmdrl.roles.handles import Policy, Reference
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run


def dpo(run: Run) -> None:
    trainer = run.make(run.config.trainer, DpoTrainer)
    run.evaluate_with(trainer.held_out)
    for step in run.steps():
        run.evaluate(step, syncs=True)
        batch = run.rows(step)  # preference pairs, two rows each: home rows
        run.finish(step, batch, trainer.step(step, batch))
    run.conclude(syncs=True)


class DpoTrainer:
    """Turns preference pairs into updates of the policy."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.role("policy", Policy)
        self.settings = run.config.preference
        self.loss = pair_loss(self.settings)
        self.others = other_responses(run) if self.settings.loss == "kto" else None
        self.reference = reference_sums(run, self.settings, self.others)
        self.held_out = HeldOutPreferences(run, self.policy, self.reference, self.settings)

    def step(self, step: int, batch: Batch) -> Metrics:
        """Update the policy on `batch`: `tokens`, `prompt_ids` (one per pair), `sample_index`."""
        metrics: dict[str, float] = {}
        batch = with_pair_shares(preferring_chosen(batch))
        with self.run.phase("logprobs"):
            if self.reference is not None:
                batch = self.reference.add(batch)
            if self.others is not None:
                baseline = self._baseline(self.others.batch(step))
                column = torch.full((len(batch),), baseline, dtype=torch.float64)
                batch = batch.with_columns(rows={BASELINE: column})
                metrics[BASELINE] = baseline
        update = pair_update(self.run, step, batch, temperature=1.0)
        with self.run.phase("update"):
            records = self.policy.update(batch, self.loss, update)
        return {**pair_metrics(records), **metrics}

    def _baseline(self, mismatched: Batch) -> float:
        """KTO's z, estimated on prompts with responses to other prompts."""
        drift = log_ratio(self.policy, self.reference, mismatched)
        tokens = mismatched.row_sum(mismatched["loss_mask"])
        return kto_baseline(moments(as_compared(drift, tokens, self.settings)).mean)


def preferring_chosen(batch: Batch) -> Batch:
    """Add the column `preference` to data pairs: 1 for chosen, 0 for rejected."""
    return batch.with_columns(rows={"preference": (batch["sample_index"] == 0).double()})


def other_responses(run: Run) -> StepRows:
    """Each step's prompts with responses to others, for KTO. ValueError: they are no pairs."""
    pairs = items_of(run.data.data, Pair)
    if pairs is None:
        raise ValueError("preference.loss=kto needs data of kind preferences")
    return StepRows(run.world, mismatched(pairs), run.data.stream)


def reference_sums(
    run: Run, settings: PreferenceSection, others: StepRows | None
) -> ReferenceSums | None:
    """Reference sums as `preference.reference` wants them; None if the loss has no reference."""
    if not settings.needs_reference:
        return None
    if run.config.preference.reference == "step":
        return AskedSums(run.role("reference", Reference))
    steps = range(run.config.steps)
    drawn = sorted({i for step in steps for i in run.data.stream.indices(step)})
    sets: list[tuple[DataSet, list[int]]] = [(run.data.data, drawn)]
    if others is not None:
        sets.append((others.data, drawn))
    sets += [(data, list(range(len(data)))) for data in run.held_out_sets(Pair).values()]
    with run.phase("reference"):
        return CachedSums(run, sets)
