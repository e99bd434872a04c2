"""PPO-RLHF: policy, value model, frozen reference and reward, with a KL penalty in the reward.

Follows Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and InstructGPT (Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155): per-token KL penalty plus the score at the end, generalised
advantage estimation (https://arxiv.org/abs/1506.02438), the clipped objective of PPO
(https://arxiv.org/abs/1707.06347) and the clipped value loss of its code. Left out: the pretraining
term (PPO-ptx) and a trunk shared by policy and value.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spmdrl.algorithms.advantages import whiten
from spmdrl.algorithms.value_loss import VALUE_COLUMNS, clipped_value_loss, explained_variance, gae
from spmdrl.batch import Batch
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.distributed.reduce import moments
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.flows.policy_terms import policy_columns, policy_loss, update_of, with_loss_weights
from spmdrl.flows.ppo_rewards import PpoRewards
from spmdrl.roles.calls import Call
from spmdrl.roles.handles import Policy, Reference, Value, together
from spmdrl.run.protocols import Environment, Metrics, Trainer
from spmdrl.run.run import Run
from spmdrl.run.step_report import joined, update_metrics
from spmdrl.training.protocol import LossFn, LossInput


def ppo(run: Run) -> None:
    environment: Environment = run.make(run.config.environment, GroupEnvironment)
    trainer: Trainer = run.make(run.config.trainer, PpoTrainer)
    sync = run.weight_sync("policy", "rollout")
    for step in run.steps():
        with run.phase("sync"):
            sync.run()
        run.evaluate(step)
        # samples and their scores (flows/environment.py), rows split over all ranks: at home
        batch = environment.collect(step)
        # values, advantages and updates; with lag: 1 the next step's samples are drawn alongside
        metrics = trainer.step(step, batch, *environment.ahead(step + 1))
        run.finish(step, batch, joined(environment.metrics(), metrics))
    sync.run()  # the last evaluation is of the last weights
    run.conclude()


class PpoTrainer:
    """Turns scored samples into updates of the policy and of the value model."""

    def __init__(self, run: Run) -> None:
        algorithm = run.config.algorithm
        self.run, self.algorithm = run, algorithm
        self.policy, self.value = run.role("policy", Policy), run.role("value", Value)
        self.reference = run.role("reference", Reference) if algorithm.kl_coef > 0 else None
        # PPO's KL is in the reward whatever `kl_in` says, so that the loss has none
        self.policy_loss = policy_loss(algorithm.model_copy(update={"kl_in": "reward"}))
        self.value_loss = value_loss(algorithm)
        self.rewards = PpoRewards(run)

    def step(self, step: int, batch: Batch, *alongside: Call[Any]) -> Metrics:
        """Update value model and policy on `batch`: rows of `rollout.generate` with `rewards`.

        The calls of `alongside` run next to the update: the next step's rollout, with `lag: 1`.
        """
        with self.run.phase("logprobs"):
            batch = self._read(batch)
        waits = step < self.algorithm.value_warmup_steps
        batch, metrics = self._advantages(batch, policy_waits=waits)
        self.run.log_rows(batch)
        read = (*VALUE_COLUMNS, "loss_weights")
        options = update_of(self.run, "value", step, read, temperature=1.0)
        value_update = self.value.update.on(batch, self.value_loss, options)
        policy_update = None
        if not waits:
            columns, temperature = policy_columns(batch), self.run.config.sampling.temperature
            options = update_of(self.run, "policy", step, columns, temperature=temperature)
            policy_update = self.policy.update.on(batch, self.policy_loss, options)
        with self.run.phase("update"):
            of_value, of_policy, *_ = together(value_update, policy_update, *alongside)
        value_metrics = dict(update_metrics(of_value))
        if of_value:
            value_metrics["explained_variance"] = explained_variance(value_metrics)
        policy_metrics = update_metrics(of_policy or [])
        named = {f"value/{name}": value for name, value in value_metrics.items()}
        return {**metrics, **policy_metrics, **named}

    def _read(self, batch: Batch) -> Batch:
        """Add `old_values`, `ref_logprobs` if there is a KL, and `old_logprobs`.

        The latter are computed unless those of the rollout are taken: the KL in the reward reads
        them, also where the loss could do with its own.
        """
        temperature = self.run.config.sampling.temperature
        calls: list[Call[Any]] = [self.value.values.on(batch)]
        if self.reference is not None:
            calls.append(self.reference.logprobs.on(batch, temperature))
        if self.algorithm.old_logprobs != "rollout":
            calls.append(self.policy.logprobs.on(batch, temperature))
        for columns in together(*calls):
            batch = batch | columns
        # the policy's call has added `logprobs`, the value model's `values`
        own = "logprobs" if "logprobs" in batch else "rollout_logprobs"
        return batch.with_columns(
            tokens={"old_logprobs": batch[own], "old_values": batch["values"]}
        )

    def _advantages(self, batch: Batch, *, policy_waits: bool) -> tuple[Batch, Metrics]:
        """Add `advantages` and `returns` of the rewards per token, and return their metrics too."""
        mask, algorithm = batch["loss_mask"], self.algorithm
        # the policy cannot move during value warm-up: its KL says nothing about the coefficient
        rewards, metrics = self.rewards.of(batch, steer=not policy_waits)
        advantages, returns = gae(
            rewards,
            batch["old_values"],
            batch.lengths,
            mask,
            gamma=algorithm.gamma,
            lam=algorithm.gae_lambda,
        )
        spread = moments(advantages, mask)
        if algorithm.whiten_advantages:
            advantages = whiten(advantages, spread.mean, spread.std, shift_mean=True) * mask
        batch = batch.with_columns(tokens={"advantages": advantages, "returns": returns})
        return with_loss_weights(batch, self.run), {
            **metrics,
            "advantage_std": spread.std,
            "sample_lag": self.policy.version - moments(batch["weight_version"]).mean,
        }


def value_loss(algorithm: AlgorithmSection) -> LossFn:
    """Make the loss of one microbatch: an unnormalised sum over its response tokens."""

    def loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        weights = given.columns["loss_weights"]
        return clipped_value_loss(given["values"], given.columns, weights, algorithm.value_clip)

    return loss
