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
from spmdrl.algorithms.kl import AdaptiveKl, FixedKl, KlControl, kl, sequence_kl
from spmdrl.algorithms.reward_shaping import (
    RewardScaler,
    missing_eos_penalty,
    scale_and_clip,
    token_rewards,
)
from spmdrl.algorithms.value_loss import VALUE_COLUMNS, clipped_value_loss, explained_variance, gae
from spmdrl.batch import Batch
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.distributed.reduce import Moments, moments
from spmdrl.flows.advantage_terms import pays_turns
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.flows.policy_terms import policy_columns, policy_loss, update_of, with_loss_weights
from spmdrl.roles.calls import Call
from spmdrl.roles.handles import Policy, Reference, Value, together
from spmdrl.roles.turn_calls import TURN_REWARDS
from spmdrl.rollout.protocol import Finish
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
        self.kl, self.scaler = kl_control(algorithm), RewardScaler()
        if run.saved:  # values from the checkpoint that the run resumes from
            self.kl = self.kl.restored(run.saved["kl_control"])
            self.scaler = RewardScaler.from_state(run.saved["score_scaler"])

    def step(self, step: int, batch: Batch, *alongside: Call[Any]) -> Metrics:
        """Update value model and policy on `batch`: rows of `rollout.generate` with `rewards`.

        The calls of `alongside` run next to the update: the next step's rollout, with `lag: 1`.
        """
        with self.run.phase("logprobs"):
            batch = self._read(batch)
        waits = step < self.algorithm.value_warmup_steps
        batch, metrics = self._shape(batch, policy_waits=waits)
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

    def _shape(self, batch: Batch, *, policy_waits: bool) -> tuple[Batch, Metrics]:
        """Add `advantages` and `returns`, made from scores and KL, and return their metrics too."""
        mask, lengths = batch["loss_mask"], batch.lengths
        scores, turn_rewards = self._scores(batch), None
        ends = scores
        if pays_turns(batch, self.algorithm):
            # on the scale that `_scores` has just made; the end of the response gets the rest
            turn_rewards = batch[TURN_REWARDS] * self._scale
            ends = scores.double() - batch.row_sum(turn_rewards.double())
        token_kl, coefficient = batch["old_logprobs"].new_zeros(batch.num_tokens), self.kl.coef
        if self.reference is not None:
            token_kl = kl(batch["old_logprobs"], batch["ref_logprobs"], "k1")
        rewards = token_rewards(
            ends, token_kl, lengths, mask, kl_coef=coefficient, turn_rewards=turn_rewards
        )
        advantages, returns = gae(
            rewards,
            batch["old_values"],
            lengths,
            mask,
            gamma=self.algorithm.gamma,
            lam=self.algorithm.gae_lambda,
        )
        spread = moments(advantages, mask)
        if self.algorithm.whiten_advantages:
            advantages = whiten(advantages, spread.mean, spread.std, shift_mean=True) * mask
        live = batch.row_sum(mask) > 0  # a response without loss tokens has no KL and no reward
        drift = moments(sequence_kl(token_kl, lengths, mask), live)
        self._adapt(drift, policy_waits=policy_waits)
        batch = batch.with_columns(tokens={"advantages": advantages, "returns": returns})
        return with_loss_weights(batch, self.run), {
            "kl_per_response": drift.mean,
            "kl_coef": coefficient,
            "score": moments(scores).mean,
            "shaped_reward": moments(batch.row_sum(rewards), live).mean,
            "advantage_std": spread.std,
            "sample_lag": self.policy.version - moments(batch["weight_version"]).mean,
        }

    def _scores(self, batch: Batch) -> Tensor:  # [B]
        """Rewards after the penalty for cut responses, scaling and clipping."""
        algorithm = self.algorithm
        cut = batch["finish"] == Finish.LENGTH
        scores = missing_eos_penalty(batch["rewards"], cut, penalty=algorithm.cut_penalty)
        if algorithm.score_scaling != "none":
            seen = moments(scores)
            self.scaler = self.scaler.updated(seen.count, seen.mean, seen.std)
        if algorithm.score_scaling == "whiten":
            scores = scores - self.scaler.mean
        return scale_and_clip(scores, scale=self._scale, clip=algorithm.score_clip)

    @property
    def _scale(self) -> float:
        return 1.0 if self.algorithm.score_scaling == "none" else self.scaler.scale

    def _adapt(self, drift: Moments, *, policy_waits: bool) -> None:
        # the policy cannot move during value warm-up: its KL says nothing about the coefficient
        if not policy_waits:
            self.kl = self.kl.updated(drift.mean, int(drift.count))
        self.run.saved["kl_control"] = self.kl.state()
        self.run.saved["score_scaler"] = self.scaler.state()


def kl_control(algorithm: AlgorithmSection) -> KlControl:
    """Controller of the KL coefficient: fixed, or steered towards `algorithm.kl_target`."""
    if algorithm.kl_target is None:
        return FixedKl(coef=algorithm.kl_coef)
    return AdaptiveKl(
        coef=algorithm.kl_coef, target=algorithm.kl_target, horizon=algorithm.kl_horizon
    )


def value_loss(algorithm: AlgorithmSection) -> LossFn:
    """Make the loss of one microbatch: an unnormalised sum over its response tokens."""

    def loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        weights = given.columns["loss_weights"]
        return clipped_value_loss(given["values"], given.columns, weights, algorithm.value_clip)

    return loss
