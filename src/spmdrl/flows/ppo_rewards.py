"""`PpoRewards`: rewards per token of PPO-RLHF, and what they remember from step to step."""

from __future__ import annotations

from torch import Tensor

from spmdrl.algorithms.kl import AdaptiveKl, FixedKl, KlControl, kl, sequence_kl
from spmdrl.algorithms.reward_shaping import (
    RewardScaler,
    missing_eos_penalty,
    scale_and_clip,
    token_rewards,
)
from spmdrl.batch import Batch
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.distributed.reduce import moments
from spmdrl.flows.advantage_terms import pays_turns
from spmdrl.roles.turn_calls import TURN_REWARDS
from spmdrl.rollout.protocol import Finish
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run


class PpoRewards:
    """The score at the end of a response less the KL penalty of each of its tokens.

    Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), section 2.2. It remembers the moments of
    all scores, which scale them, and the KL coefficient, which may be steered.

    Args:
        run: its `saved` has values that checkpoints keep, which this class reads and writes.
    """

    def __init__(self, run: Run) -> None:
        self.algorithm, self.saved = run.config.algorithm, run.saved
        self.kl, self.scaler = kl_control(self.algorithm), RewardScaler()
        if self.saved:  # a run that resumes from a checkpoint
            self.kl = self.kl.restored(self.saved["kl_control"])
            self.scaler = RewardScaler.from_state(self.saved["score_scaler"])

    def of(self, batch: Batch, *, steer: bool) -> tuple[Tensor, Metrics]:
        """Rewards of all tokens `[T]`, float32, and metrics of them; collective.

        Args:
            batch: scored rows (`rewards`, `[B]`) with `old_logprobs`, and `ref_logprobs` if there
                is a reference, `[T]`.
            steer: whether the batch's KL moves the coefficient of the next one.
        """
        mask, lengths = batch["loss_mask"], batch.lengths
        scores = ends = self._scores(batch)
        turn_rewards = None
        if pays_turns(batch, self.algorithm):
            # on the same scale as the scores; the end of the response gets the rest
            turn_rewards = batch[TURN_REWARDS] * self._scale
            ends = scores.double() - batch.row_sum(turn_rewards.double())
        token_kl, coefficient = batch["old_logprobs"].new_zeros(batch.num_tokens), self.kl.coef
        if "ref_logprobs" in batch:
            token_kl = kl(batch["old_logprobs"], batch["ref_logprobs"], "k1")
        rewards = token_rewards(
            ends, token_kl, lengths, mask, kl_coef=coefficient, turn_rewards=turn_rewards
        )
        live = batch.row_sum(mask) > 0  # a response without loss tokens has no KL and no reward
        drift = moments(sequence_kl(token_kl, lengths, mask), live)
        if steer:
            self.kl = self.kl.updated(drift.mean, int(drift.count))
        self.saved["kl_control"] = self.kl.state()
        self.saved["score_scaler"] = self.scaler.state()
        return rewards, {
            "kl_per_response": drift.mean,
            "kl_coef": coefficient,
            "score": moments(scores).mean,
            "shaped_reward": moments(batch.row_sum(rewards), live).mean,
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


def kl_control(algorithm: AlgorithmSection) -> KlControl:
    """Controller of the KL coefficient: fixed, or steered towards `algorithm.kl_target`."""
    if algorithm.kl_target is None:
        return FixedKl(coef=algorithm.kl_coef)
    return AdaptiveKl(
        coef=algorithm.kl_coef, target=algorithm.kl_target, horizon=algorithm.kl_horizon
    )
