"""Advantages of flow `grpo`: one function per `algorithm.advantage`, and the teacher's term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spmdrl.algorithms.advantages import (
    broadcast_to_tokens,
    group_advantages,
    leave_one_out,
    rewards_to_go,
    whiten,
)
from spmdrl.algorithms.kl import kl
from spmdrl.algorithms.rewards import kl_in_reward, overlong_penalty
from spmdrl.algorithms.turn_credit import turn_advantages, turn_returns, turn_tokens
from spmdrl.batch import Batch
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.distributed.reduce import moments
from spmdrl.roles.turn_calls import TURN_REWARDS


def token_advantages(batch: Batch, algorithm: AlgorithmSection, max_tokens: int) -> Tensor:
    """Advantage of each token: float32 `[T]`, 0 outside the loss mask; every rank calls it.

    `batch` has `rewards`; `old_logprobs` and `ref_logprobs` if a KL goes into the reward;
    `old_logprobs` and `teacher_logprobs` if `teacher_coef` > 0.
    """
    rewards = shaped_rewards(batch, algorithm, max_tokens)
    advantages = ADVANTAGES[algorithm.advantage](batch, rewards, algorithm)
    if algorithm.teacher_coef > 0:
        advantages = advantages + algorithm.teacher_coef * teacher_advantages(batch)
    return advantages


def pays_turns(batch: Batch, algorithm: AlgorithmSection) -> bool:
    """Whether advantages are of turns (`algorithm.credit: turn`)."""
    return algorithm.credit == "turn" and TURN_REWARDS in batch


def end_rewards(batch: Batch, rewards: Tensor) -> Tensor:  # [B], [B] -> float64 [B]
    """Rewards of rows less those of their turns: what comes at a row's end alone."""
    return rewards.double() - batch.row_sum(batch[TURN_REWARDS].double())


def advantages_of_turns(
    batch: Batch, rewards: Tensor, *, std: bool = False, others: bool = False
) -> Tensor:
    """Rewards from each turn on, less their mean over the group's samples that have such a turn
    (`algorithms.turn_credit`): `[T]`.

    Args:
        rewards: those of whole rows, `[B]`.
        others: the mean is that of the other samples.
    """
    turns = turn_tokens(batch.lengths, batch["loss_mask"])
    returns = turn_returns(turns, batch[TURN_REWARDS], end_rewards(batch, rewards))
    ids = batch["prompt_ids"]
    return turn_advantages(returns, turns, rewards, ids, std=std, leave_one_out=others)


def grpo_advantages(batch: Batch, rewards: Tensor, algorithm: AlgorithmSection) -> Tensor:
    """GRPO (DeepSeekMath, arXiv 2402.03300); without `advantage_std` Dr.GRPO (arXiv 2503.20783)."""
    if pays_turns(batch, algorithm):
        return advantages_of_turns(batch, rewards, std=algorithm.advantage_std)
    own = group_advantages(rewards, batch["prompt_ids"], std=algorithm.advantage_std)
    return broadcast_to_tokens(own, batch.lengths, batch["loss_mask"])


def rloo_advantages(batch: Batch, rewards: Tensor, algorithm: AlgorithmSection) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): each reward less the others' mean."""
    if pays_turns(batch, algorithm):
        return advantages_of_turns(batch, rewards, others=True)
    own = leave_one_out(rewards, batch["prompt_ids"])
    return broadcast_to_tokens(own, batch.lengths, batch["loss_mask"])


def reinforce_pp_advantages(batch: Batch, rewards: Tensor, algorithm: AlgorithmSection) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): each token's reward-to-go includes its KL."""
    mask = batch["loss_mask"]
    token_kl, coefficient = torch.zeros(batch.num_tokens), 0.0
    if puts_kl_in_reward(algorithm):
        coefficient = algorithm.kl_coef
        token_kl = kl(batch["old_logprobs"], batch["ref_logprobs"], algorithm.kl_estimator)
    turn_rewards = None
    if pays_turns(batch, algorithm):
        rewards, turn_rewards = end_rewards(batch, rewards), batch[TURN_REWARDS]
    own = rewards_to_go(
        rewards, token_kl, batch.lengths, mask, kl_coef=coefficient, turn_rewards=turn_rewards
    )
    return whitened(own, mask)


def reinforce_pp_baseline_advantages(
    batch: Batch, rewards: Tensor, algorithm: AlgorithmSection
) -> Tensor:
    """REINFORCE++ with baseline (arXiv 2501.03262): rewards less the group's mean, whitened."""
    mask = batch["loss_mask"]
    if pays_turns(batch, algorithm):
        return whitened(advantages_of_turns(batch, rewards), mask)
    own = group_advantages(rewards, batch["prompt_ids"], std=False)
    return whitened(broadcast_to_tokens(own, batch.lengths, mask), mask)


ADVANTAGES: Mapping[str, Callable[[Batch, Tensor, AlgorithmSection], Tensor]] = MappingProxyType(
    {
        "grpo": grpo_advantages,
        "rloo": rloo_advantages,
        "reinforce_pp": reinforce_pp_advantages,
        "reinforce_pp_baseline": reinforce_pp_baseline_advantages,
    }
)


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:  # [T], [T] bool
    """Whiten over the masked tokens of all ranks: `[T]`; exactly 0 if all of them are equal."""
    spread = moments(advantages, mask)
    if spread.minimum == spread.maximum:
        # their rounded mean may differ from them slightly, and the division would magnify that
        return torch.zeros_like(advantages)
    return whiten(advantages, spread.mean, spread.std, shift_mean=True) * mask


def teacher_advantages(batch: Batch) -> Tensor:
    """Teacher's log-probability less the policy's, per sampled token: `[T]`, 0 outside the mask.

    On-policy distillation: each token's reward is its own reverse KL, without those of later tokens
    (Agarwal et al. 2023, arXiv 2306.13649, with lambda = 1 and the reverse KL; Lu & Thinking
    Machines Lab 2025, "On-Policy Distillation").
    """
    gap = batch["teacher_logprobs"] - batch["old_logprobs"]
    return torch.where(batch["loss_mask"], gap, 0.0)


def puts_kl_in_reward(algorithm: AlgorithmSection) -> bool:
    return algorithm.kl_coef > 0 and algorithm.kl_in == "reward"


def shaped_rewards(batch: Batch, algorithm: AlgorithmSection, max_tokens: int) -> Tensor:  # [B]
    """Rewards after the overlong penalty and, unless tokens carry it, the response's KL penalty."""
    rewards = batch["rewards"]
    if algorithm.overlong_buffer > 0:
        # of turns, what was given counts as well: it takes of the same room
        takes_turns = TURN_REWARDS in batch
        lengths = batch.lengths - batch["prompt_lengths"] if takes_turns else None
        rewards = rewards + overlong_penalty(
            batch["response_lengths"] if lengths is None else lengths,
            max_tokens=max_tokens,
            buffer=algorithm.overlong_buffer,
            factor=algorithm.overlong_penalty,
        )
    # REINFORCE++ puts the KL into each token's reward
    if puts_kl_in_reward(algorithm) and algorithm.advantage != "reinforce_pp":
        token_kl = kl(batch["old_logprobs"], batch["ref_logprobs"], algorithm.kl_estimator)
        rewards = kl_in_reward(
            rewards, token_kl, batch["loss_mask"], batch.lengths, coefficient=algorithm.kl_coef
        )
    return rewards
