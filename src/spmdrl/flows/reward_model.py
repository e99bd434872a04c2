"""Reward model: train a scalar head on a language model with preference pairs.

Follows InstructGPT (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1): the
Bradley-Terry likelihood that the chosen response scores higher, with Llama 2's optional margin
(https://arxiv.org/abs/2307.09288, eq. 2) and a term that keeps scores around 0. Left out: ranking
more than two responses at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spmdrl.algorithms.supervised import bradley_terry_loss
from spmdrl.batch import Batch
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.data.preferences import Pair
from spmdrl.evaluation.metrics import CHOSEN, pair_accuracy
from spmdrl.flows.policy_terms import update_of
from spmdrl.roles.handles import Reward
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from spmdrl.run.step_report import update_metrics
from spmdrl.training.protocol import LossFn, LossInput


def reward_model(run: Run) -> None:
    trainer = run.make(run.config.trainer, RewardModelTrainer)
    run.evaluate_with(HeldOutPairs(run))
    for step in run.steps():
        run.evaluate(step, syncs=True)
        batch = run.rows(step)  # preference pairs, two rows each: home rows
        run.finish(step, batch, trainer.step(step, batch))
    run.conclude(syncs=True)


class RewardModelTrainer:
    """Turns preference pairs into updates of the reward model."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reward = run.role("reward", Reward)
        self.loss = pairwise_loss(run.config.algorithm)

    def step(self, step: int, batch: Batch) -> Metrics:
        """Update the model on `tokens`, `prompt_ids` (one per pair), `sample_index`, `margin`."""
        # a pair is two rows, and counts once
        half = {"loss_share": torch.full((len(batch),), 0.5).double()}
        update = update_of(self.run, "reward", step, ("sample_index", "margin"), temperature=1.0)
        with self.run.phase("update"):
            records = self.reward.update(
                batch.with_columns(rows=half), self.loss, replace(update, whole_groups=True)
            )
        metrics = dict(update_metrics(records))
        pairs = metrics.pop("update_tokens")  # the loss counts pairs as its tokens
        return {**metrics, "pairs": pairs}


def pairwise_loss(algorithm: AlgorithmSection) -> LossFn:
    """Make the loss of one microbatch: an unnormalised sum over its pairs."""

    def loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        rows = given.rows
        return bradley_terry_loss(
            given["scores"],
            rows["sample_index"][given.row] == CHOSEN,
            rows["prompt_ids"][given.row],
            margin=rows["margin"][given.row],
            centre_coef=algorithm.centre_coef,
        )

    return loss


class HeldOutPairs:
    """Measures how often the chosen response of a held-out pair scores higher."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reward = run.role("reward", Reward)

    def evaluate(self, step: int) -> Metrics:
        """Metrics `eval/SET` (the accuracy) and `eval/SET/margin`, with standard errors."""
        found: dict[str, float] = {}
        for name, batch in self.run.held_out(Pair):
            found |= pair_accuracy(name, batch, self.reward.score(batch)["scores"])
        return found
