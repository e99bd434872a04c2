"""GRPO and its variants: several samples per prompt, rewards -> advantages -> policy gradient.

Follows DeepSeekMath (Shao et al. 2024, https://arxiv.org/abs/2402.03300), with the options of
Dr.GRPO (https://arxiv.org/abs/2503.20783: no std, fixed-length mean) and DAPO
(https://arxiv.org/abs/2503.14476: token mean, clip-higher, dynamic sampling, overlong shaping).
`algorithm.advantage` turns it into RLOO or REINFORCE++, `algorithm.policy_loss` into GSPO or CISPO.
A role `teacher` is distilled on the policy's own samples (`advantage_terms` names the papers).
Left out: process rewards and the iterated refresh of the reference.
"""

from __future__ import annotations

from typing import Any

from spmdrl.batch import Batch
from spmdrl.config.data_sets import response_tokens
from spmdrl.distributed.reduce import moments, world_any
from spmdrl.flows.advantage_terms import puts_kl_in_reward, token_advantages
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.flows.policy_terms import policy_columns, policy_loss, update_of, with_loss_weights
from spmdrl.roles.calls import Call
from spmdrl.roles.handles import Policy, Reference, together
from spmdrl.run.protocols import Environment, Metrics, Trainer
from spmdrl.run.run import Run
from spmdrl.run.step_report import joined, update_metrics


def grpo(run: Run) -> None:
    environment: Environment = run.make(run.config.environment, GroupEnvironment)
    trainer: Trainer = run.make(run.config.trainer, GrpoTrainer)
    sync = run.weight_sync("policy", "rollout")
    for step in run.steps():
        with run.phase("sync"):
            sync.run()
        run.evaluate(step)
        # samples and their rewards (flows/environment.py), rows split over all ranks: at home
        batch = environment.collect(step)
        # advantages and updates; with lag: 1 the next step's samples are drawn alongside
        metrics = trainer.step(step, batch, *environment.ahead(step + 1))
        run.finish(step, batch, joined(environment.metrics(), metrics))
    sync.run()  # the last evaluation is of the last weights
    run.conclude()


class GrpoTrainer:
    """Turns scored groups into updates of the policy."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.policy = run.role("policy", Policy)
        algorithm = run.config.algorithm
        self.loss = policy_loss(algorithm)
        self.reference = run.role("reference", Reference) if algorithm.kl_coef > 0 else None
        self.teacher = run.role("teacher", Reference) if algorithm.teacher_coef > 0 else None

    def step(self, step: int, batch: Batch, *alongside: Call[Any]) -> Metrics:
        """Update the policy on `batch`: rows of `rollout.generate` with the row column `rewards`.

        The calls of `alongside` run next to the update: the next step's rollout, with `lag: 1`.
        """
        config = self.run.config
        temperature = config.sampling.temperature
        with self.run.phase("logprobs"):
            batch = self._add_logprobs(batch, temperature)
        advantages = token_advantages(batch, config.algorithm, response_tokens(config))
        batch = with_loss_weights(batch.with_columns(tokens={"advantages": advantages}), self.run)
        self.run.log_rows(batch)
        update = None
        if self._has_gradient(batch):
            columns = policy_columns(batch)
            options = update_of(self.run, "policy", step, columns, temperature=temperature)
            update = self.policy.update.on(batch, self.loss, options)
        # in optimizer steps, and before the update, which adds its own
        lag = self.policy.version - moments(batch["weight_version"]).mean
        with self.run.phase("update"):
            # the other results are samples of the next step, which the environment keeps
            records, *_ = together(update, *alongside)
        metrics = {**update_metrics(records or []), "sample_lag": lag}
        if self.teacher is not None:
            gap = batch["old_logprobs"] - batch["teacher_logprobs"]
            metrics["teacher_kl"] = moments(gap, batch["loss_mask"]).mean
        return metrics

    def _has_gradient(self, batch: Batch) -> bool:
        """Whether any sample on any rank moves the policy; if none does, the update is skipped."""
        algorithm = self.run.config.algorithm
        other_terms = algorithm.entropy_coef != 0 or algorithm.loss_kl_coef > 0
        return other_terms or world_any(bool((batch["advantages"] != 0).any()))

    def _add_logprobs(self, batch: Batch, temperature: float) -> Batch:
        """Add `ref_logprobs` if a KL needs them, and `old_logprobs` unless the loss has its own.

        With one optimizer step per update, the old policy is the one being updated: the loss then
        uses its own log-probabilities, detached, as the old ones.
        """
        train, algorithm = self.run.config.train_section("policy"), self.run.config.algorithm
        calls = []
        if self.reference is not None:
            calls.append(self.reference.logprobs.on(batch, temperature))
        if self.teacher is not None:
            calls.append(self.teacher.logprobs.on(batch, temperature))
        several_steps = train.epochs * train.num_minibatches > 1
        wanted = several_steps or puts_kl_in_reward(algorithm) or self.teacher is not None
        source = algorithm.old_logprobs
        if source == "trainer" or (source == "auto" and wanted):
            calls.append(self.policy.logprobs.on(batch, temperature))
        for columns in together(*calls):
            batch = batch | columns
        if source == "rollout":
            return batch.with_columns(tokens={"old_logprobs": batch["rollout_logprobs"]})
        if "logprobs" in batch:
            return batch.with_columns(tokens={"old_logprobs": batch["logprobs"]})
        return batch
