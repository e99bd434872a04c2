"""Supervised fine-tuning: minimise the negative log-likelihood of responses, on packed rows.

This is the first stage of InstructGPT (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
section 3.5). The loss is the mean over a minibatch's response tokens. Left out: loss on prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.algorithms.supervised import next_token_loss
from spmdrl.batch import Batch
from spmdrl.data.conversations import Conversation
from spmdrl.distributed.reduce import moments
from spmdrl.flows.policy_terms import update_of
from spmdrl.observe.names import EVAL, STANDARD_ERROR
from spmdrl.roles.handles import Policy
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from spmdrl.run.step_report import update_metrics
from spmdrl.training.protocol import LossInput


def sft(run: Run) -> None:
    trainer = run.make(run.config.trainer, SftTrainer)
    run.evaluate_with(HeldOutLikelihood(run))
    for step in run.steps():
        run.evaluate(step, syncs=True)
        batch = run.rows(step)  # conversations: home rows
        run.finish(step, batch, trainer.step(step, batch))
    run.conclude(syncs=True)


class SftTrainer:
    """Turns conversations into updates of the policy."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.role("policy", Policy)

    def step(self, step: int, batch: Batch) -> Metrics:
        """Update the policy on `batch`: rows with `tokens` and `loss_mask`."""
        shares = {"loss_share": batch.row_sum(batch["loss_mask"]).double()}
        with self.run.phase("update"):
            update = update_of(self.run, "policy", step, (), temperature=1.0, entropy=False)
            records = self.policy.update(batch.with_columns(rows=shares), likelihood_loss, update)
        return update_metrics(records)


def likelihood_loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one microbatch: an unnormalised sum over its response tokens."""
    return next_token_loss(given["logprobs"], torch.ones_like(given["logprobs"]))


class HeldOutLikelihood:
    """Measures the mean negative log-likelihood per token of held-out responses."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.role("policy", Policy)

    def evaluate(self, step: int) -> Metrics:
        """Metric `eval/SET/nll` in nats per token, with its error clustered by conversation."""
        found: dict[str, float] = {}
        for set_name, batch in self.run.held_out(Conversation):
            logprobs = self.policy.logprobs(batch)["logprobs"]
            nll = -batch.row_sum(logprobs.double())
            tokens = batch.row_sum(batch["loss_mask"]).double()
            per_row, count = moments(nll), moments(tokens)
            mean = per_row.mean / count.mean
            # error of a ratio of means: from the spread of the rows' contributions
            spread = moments(nll - mean * tokens).std / count.mean / max(count.count, 1.0) ** 0.5
            name = f"{EVAL}{set_name}/nll"
            found |= {name: mean, name + STANDARD_ERROR: spread}
        return found
