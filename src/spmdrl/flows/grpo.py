"""GRPO: groups of samples per prompt, advantages within the group, a clipped policy loss.

Follows DeepSeekMath (Shao et al. 2024, https://arxiv.org/abs/2402.03300), with the options of
Dr.GRPO (https://arxiv.org/abs/2503.20783: no std, fixed-length mean) and DAPO
(https://arxiv.org/abs/2503.14476: token mean, clip-higher, dynamic sampling, overlong shaping).
Left out: process rewards, and the iterated refresh of the reference.
"""

from __future__ import annotations

from torch import Tensor

from spmdrl.algorithms.advantages import broadcast_to_tokens, group_advantages
from spmdrl.algorithms.kl import kl
from spmdrl.algorithms.policy_loss import (
    COLUMNS,
    PolicyLossConfig,
    clipped_policy_loss,
    loss_shares,
    loss_weights,
)
from spmdrl.algorithms.rewards import kl_in_reward, overlong_penalty
from spmdrl.batch import Batch
from spmdrl.config import AlgorithmSection
from spmdrl.distributed.reduce import world_any
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.flows.run import Environment, Metrics, Run, Trainer, update_metrics
from spmdrl.roles import Policy, Reference, Update, together
from spmdrl.training.protocol import LossFn, LossInput


def grpo(run: Run) -> None:
    environment: Environment = run.make(run.config.environment, GroupEnvironment)
    trainer: Trainer = run.make(run.config.trainer, GrpoTrainer)
    sync = run.weight_sync("policy", "rollout")
    for step in run.steps():
        with run.phase("sync"):
            sync.run()
        run.evaluate(step)
        batch = environment.collect(step)  # prompts, samples and rewards: home rows
        metrics = trainer.step(step, batch)  # advantages, updates
        run.finish(step, batch, {**environment.metrics(), **metrics})
    sync.run()
    run.conclude()


class GrpoTrainer:
    """Turns scored groups into updates of the policy."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.role("policy", Policy)
        self.loss = policy_loss(run.config.algorithm)
        self.reference = None
        if run.config.algorithm.kl_coef > 0:
            self.reference = run.role("reference", Reference)

    def step(self, step: int, batch: Batch) -> Metrics:
        """`batch`: rows of `rollout.generate` with the row column `rewards`."""
        config, train = self.run.config, self.run.config.train
        temperature = config.sampling.temperature
        with self.run.phase("logprobs"):
            batch = self._add_logprobs(batch, temperature)
        batch = self._add_advantages(batch)
        if not self._has_gradient(batch):
            return update_metrics([])
        columns = [name for name in (*COLUMNS, "loss_weights") if name in batch]
        update = Update(
            seed=config.seed,
            step=step,
            epochs=train.epochs,
            num_minibatches=train.num_minibatches,
            temperature=temperature,
            columns=tuple(columns),
        )
        with self.run.phase("update"):
            optimizer_steps = self.policy.update(batch, self.loss, update)
        return update_metrics(optimizer_steps)

    def _has_gradient(self, batch: Batch) -> bool:
        """Whether some sample of the world moves the policy; if none does, nothing must."""
        algorithm = self.run.config.algorithm
        pulled = algorithm.entropy_coef != 0 or (
            algorithm.kl_coef > 0 and algorithm.kl_in == "loss"
        )
        return pulled or world_any(bool((batch["advantages"] != 0).any()))

    def _add_logprobs(self, batch: Batch, temperature: float) -> Batch:
        """`ref_logprobs` where a KL is wanted, `old_logprobs` where they are not the loss's own.

        With one optimizer step in all, the policy that is updated is the one that sampled: the loss
        then takes its own log-probabilities, detached, for the old ones.
        """
        config = self.run.config
        calls = []
        if self.reference is not None:
            calls.append(self.reference.logprobs.on(batch, temperature))
        in_reward = config.algorithm.kl_coef > 0 and config.algorithm.kl_in == "reward"
        if config.train.epochs * config.train.num_minibatches > 1 or in_reward:
            calls.append(self.policy.logprobs.on(batch, temperature))
        for columns in together(*calls):
            batch = batch | columns
        if "logprobs" in batch:
            batch = batch.with_columns(tokens={"old_logprobs": batch["logprobs"]})
        return batch

    def _add_advantages(self, batch: Batch) -> Batch:
        config = self.run.config
        algorithm, max_tokens = config.algorithm, config.sampling.max_tokens
        mask = batch["loss_mask"]
        rewards = shaped_rewards(batch, algorithm, max_tokens)
        advantages = group_advantages(rewards, batch["prompt_ids"], std=algorithm.advantage_std)
        mode = algorithm.loss_mean
        return batch.with_columns(
            tokens={
                "advantages": broadcast_to_tokens(advantages, batch.lengths, mask),
                "loss_weights": loss_weights(batch.lengths, mask, mode, max_tokens=max_tokens),
            },
            rows={"loss_share": loss_shares(batch["response_lengths"], mode)},
        )


def shaped_rewards(batch: Batch, algorithm: AlgorithmSection, max_tokens: int) -> Tensor:  # [B]
    """Rewards after the overlong penalty and the KL penalty, where the configuration has them."""
    rewards = batch["rewards"]
    if algorithm.overlong_buffer > 0:
        rewards = rewards + overlong_penalty(
            batch["response_lengths"],
            max_tokens=max_tokens,
            buffer=algorithm.overlong_buffer,
            factor=algorithm.overlong_penalty,
        )
    if algorithm.kl_coef > 0 and algorithm.kl_in == "reward":
        token_kl = kl(batch["old_logprobs"], batch["ref_logprobs"], algorithm.kl_estimator)
        rewards = kl_in_reward(
            rewards, token_kl, batch["loss_mask"], batch.lengths, coefficient=algorithm.kl_coef
        )
    return rewards


def policy_loss(algorithm: AlgorithmSection) -> LossFn:
    """The loss of one microbatch: an unnormalised sum over its response tokens."""
    settings = PolicyLossConfig(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        kl_coefficient=algorithm.kl_coef if algorithm.kl_in == "loss" else 0.0,
        kl_estimator=algorithm.kl_estimator,
        tis_cap=algorithm.importance_cap,
        entropy_coefficient=algorithm.entropy_coef,
    )

    def loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        weights = given.columns["loss_weights"]
        return clipped_policy_loss(given.logprobs, given.entropy, given.columns, weights, settings)

    return loss
