"""Online DPO: preference pairs are the policy's own samples, compared by rewards or by a judge.

Follows Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback"
(https://arxiv.org/abs/2402.04792), with any number of samples per prompt, the loss of DPO or IPO,
and for the annotator any reward (a model or a function) or a judge that compares two samples, in
both orders (`pair_verdicts`). Left out: the exploration terms of XPO and Nash-MD's mixture.
"""

from __future__ import annotations

from typing import Any

from spmdrl.algorithms.direct_preference import distinct_responses, pair_rows
from spmdrl.batch import Batch
from spmdrl.distributed.reduce import moments, world_sum
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.flows.held_out_preferences import HeldOutPreferences
from spmdrl.flows.pair_verdicts import judged_rows
from spmdrl.flows.preference_terms import (
    pair_loss,
    pair_metrics,
    pair_update,
    with_pair_shares,
)
from spmdrl.flows.reference_sums import AskedSums
from spmdrl.roles.calls import Call
from spmdrl.roles.handles import Policy, Reference, together
from spmdrl.run.protocols import Environment, Metrics
from spmdrl.run.run import Run
from spmdrl.run.step_report import joined


def online_dpo(run: Run) -> None:
    environment: Environment = run.make(run.config.environment, GroupEnvironment)
    trainer = run.make(run.config.trainer, OnlineDpoTrainer)
    run.evaluate_with(trainer.held_out)
    sync = run.weight_sync("policy", "rollout")
    for step in run.steps():
        with run.phase("sync"):
            sync.run()
        run.evaluate(step)
        batch = environment.collect(step)  # prompts, samples and rewards: home rows
        # pairs and updates; with lag: 1 the next step's samples are drawn alongside
        metrics = trainer.step(step, batch, *environment.ahead(step + 1))
        run.finish(step, batch, joined(environment.metrics(), metrics))
    sync.run()  # the last evaluation is of the last weights
    run.conclude()


class OnlineDpoTrainer:
    """Turns scored groups into pairs, and pairs into updates of the policy."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.role("policy", Policy)
        self.temperature = run.config.sampling.temperature
        reference = run.role("reference", Reference)
        self.reference = AskedSums(reference, self.temperature)
        settings = run.config.preference
        self.loss = pair_loss(settings)
        self.judged: Metrics = {}
        """Metrics of a judge's last verdicts."""
        self.held_out = HeldOutPreferences(run, self.policy, AskedSums(reference), settings)

    def step(self, step: int, batch: Batch, *alongside: Call[Any]) -> Metrics:
        """Update the policy on `batch`: rows of `rollout.generate` with the row column `rewards`.

        The calls of `alongside` run next to the update: the next step's rollout, with `lag: 1`.
        """
        pairs = self.compared(batch)
        with self.run.phase("logprobs"):
            pairs = self.reference.add(pairs)
        update = None
        if world_sum(pairs["loss_share"].sum()).item() > 0:
            options = pair_update(self.run, step, pairs, temperature=self.temperature)
            update = self.policy.update.on(pairs, self.loss, options)
        # in optimizer steps, and before the update, which adds its own
        lag = self.policy.version - moments(batch["weight_version"]).mean
        with self.run.phase("update"):
            records, *_ = together(update, *alongside)
        return {**pair_metrics(records or []), **self.judged, "sample_lag": lag}

    def compared(self, batch: Batch) -> Batch:
        """Rows that are in pairs, with their `preference` and `loss_share`."""
        # a response that the loss mask leaves out entirely has no log-probability to compare
        usable = distinct_responses(batch) & (batch.row_sum(batch["loss_mask"]) > 0)
        settings, judge = self.run.config.preference, self.run.pair_judge
        if judge is None:
            rewards, ids = batch["rewards"], batch["prompt_ids"]
            rows, preference = pair_rows(rewards, ids, usable, settings.pairs)
        else:
            with self.run.phase("reward"):
                rows, preference, self.judged = judged_rows(self.run.config, judge, batch, usable)
        pairs = batch.select(rows).with_columns(rows={"preference": preference})
        return with_pair_shares(pairs)
