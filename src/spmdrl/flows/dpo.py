"""DPO and its kin: a policy from preference pairs, without samples and without a reward model.

Follows Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290): the log-ratio of policy and
reference is the reward, and pairs are its Bradley-Terry likelihood. `preference.loss` makes it IPO,
SimPO, KTO or ORPO (`algorithms.direct_preference` names the papers), `preference.label_smoothing`
cDPO. Left out: unpaired data for KTO, whose responses come in pairs here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.algorithms.direct_preference import (
    PreferenceConfig,
    implicit_rewards,
    kto_baseline,
)
from spmdrl.batch import Batch
from spmdrl.data.home import DataSet, StepRows
from spmdrl.data.preferences import PairSet
from spmdrl.distributed.reduce import moments
from spmdrl.flows.preference_terms import (
    BASELINE,
    REFERENCE,
    pair_loss,
    pair_metrics,
    pair_update,
    preference_settings,
    with_pair_shares,
)
from spmdrl.flows.reference_sums import AskedSums, CachedSums, ReferenceSums
from spmdrl.flows.reward_model import pair_accuracy
from spmdrl.flows.run import Metrics, Run
from spmdrl.roles import Policy, Reference


def dpo(run: Run) -> None:
    trainer = run.make(run.config.trainer, DpoTrainer)
    run.evaluate_with(HeldOutPreferences(run, trainer))
    for step in run.steps():
        run.evaluate(step)
        batch = run.rows(step)  # preference pairs, two rows each: home rows
        run.finish(step, batch, trainer.step(step, batch))
    run.conclude()


class DpoTrainer:
    """Turns preference pairs into updates of the policy."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.role("policy", Policy)
        self.settings = preference_settings(run.config.preference)
        self.loss = pair_loss(self.settings)
        self.others = other_answers(run) if self.settings.loss == "kto" else None
        self.reference = reference_sums(run, self.settings, self.others)

    def step(self, step: int, batch: Batch) -> Metrics:
        """`batch`: rows with `tokens`, `prompt_ids` (of the pair) and `sample_index`."""
        metrics: dict[str, float] = {}
        batch = with_pair_shares(preferring_chosen(batch))
        with self.run.phase("logprobs"):
            batch = self.with_reference(batch)
            if self.others is not None:
                drift = self.log_ratio(self.others.batch(step))
                baseline = kto_baseline(moments(drift).mean)
                column = torch.full((len(batch),), baseline, dtype=torch.float64)
                batch = batch.with_columns(rows={BASELINE: column})
                metrics[BASELINE] = baseline
        update = pair_update(self.run, step, batch, temperature=1.0)
        with self.run.phase("update"):
            records = self.policy.update(batch, self.loss, update)
        return {**pair_metrics(records), **metrics}

    def with_reference(self, batch: Batch) -> Batch:
        """`batch` with `ref_sums`, where the loss has a reference."""
        return batch if self.reference is None else self.reference.add(batch)

    def log_ratio(self, batch: Batch) -> Tensor:
        """log policy - log reference of whole responses (without one, log policy): float64 [B]."""
        own = batch.row_sum(self.policy.logprobs(batch)["logprobs"].double())
        batch = self.with_reference(batch)
        return own - batch[REFERENCE] if REFERENCE in batch else own


class HeldOutPreferences:
    """How often, and by how much, the policy prefers the chosen answer of a held-out pair."""

    def __init__(self, run: Run, trainer: DpoTrainer) -> None:
        self.run, self.trainer = run, trainer

    def evaluate(self, step: int) -> Metrics:
        """`eval/SET` (the accuracy of the implicit reward) and `eval/SET/margin`, with errors."""
        found: dict[str, float] = {}
        for name, batch in self.run.held_out():
            ratio = self.trainer.log_ratio(batch)
            rewards = implicit_rewards(ratio, batch["response_lengths"], self.trainer.settings)
            found |= pair_accuracy(name, batch, rewards)
        return found


def preferring_chosen(batch: Batch) -> Batch:
    """`batch` of data pairs with the column `preference`: 1 chosen, 0 rejected."""
    return batch.with_columns(rows={"preference": (batch["sample_index"] == 0).double()})


def other_answers(run: Run) -> StepRows:
    """Every step's prompts with answers to other prompts, for KTO."""
    pairs = run.data.data
    if not isinstance(pairs, PairSet):
        raise ValueError("preference.loss=kto needs data of kind preferences")
    return StepRows(run.world, pairs.mismatched(), run.data.stream)


def reference_sums(
    run: Run, settings: PreferenceConfig, others: StepRows | None
) -> ReferenceSums | None:
    """As `preference.reference` has it; None where the loss has no reference."""
    if not settings.needs_reference:
        return None
    if run.config.preference.reference == "step":
        return AskedSums(run.role("reference", Reference))
    steps = range(run.config.steps)
    drawn = sorted({i for step in steps for i in run.data.stream.indices(step)})
    sets: list[tuple[DataSet, list[int]]] = [(run.data.data, drawn)]
    if others is not None:
        sets.append((others.data, drawn))
    sets += [(data, list(range(len(data)))) for data in run.held_out_sets().values()]
    with run.phase("reference"):
        return CachedSums(run, sets)
