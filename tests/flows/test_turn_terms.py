"""Advantages of `algorithm.credit: turn` in flow `grpo`, for each way of estimating them."""

from __future__ import annotations

import pytest
import torch

from harness import run_ranks
from spmdrl.algorithms.advantages import rewards_to_go
from spmdrl.algorithms.turn_credit import turn_advantages, turn_returns, turn_tokens
from spmdrl.batch import Batch
from spmdrl.config.algorithms import AlgorithmSection
from spmdrl.flows.advantage_terms import end_rewards, token_advantages, whitened
from spmdrl.world import World

# two prompts' groups; 1: sampled, 0: prompt or given
MASKS = [[0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0, 1], [0, 0, 1], [0, 1, 0, 1]]
OF_TURNS = [[0, 0, 1, 0, 2], [0, 3, 0, 0, 0, 0, 1], [0, 0, 4], [0, 2, 0, 0]]


def rows() -> Batch:
    turn_rewards = torch.tensor([value / 4 for own in OF_TURNS for value in own])
    lengths = torch.tensor([len(own) for own in MASKS])
    mask = torch.tensor([bool(value) for own in MASKS for value in own])
    batch = Batch(
        lengths=lengths,
        tokens={"loss_mask": mask, "turn_rewards": turn_rewards},
        rows={
            "prompt_ids": torch.tensor([5, 5, 8, 8]),
            "prompt_lengths": torch.tensor([1, 1, 2, 1]),
            "response_lengths": torch.tensor([sum(own) for own in MASKS]),
        },
    )
    sums = batch.row_sum(turn_rewards)
    return batch.with_columns(rows={"rewards": sums + torch.tensor([1.0, 0.0, 0.5, 2.0])})


def found(world: World, credit: str, **changes: object) -> torch.Tensor:
    return token_advantages(rows(), AlgorithmSection(credit=credit, **changes), 12)


def all_of(world: World) -> None:
    batch = rows()
    turns = turn_tokens(batch.lengths, batch["loss_mask"])
    ids, ends = batch["prompt_ids"], torch.tensor([1.0, 0.0, 0.5, 2.0])
    returns = turn_returns(turns, batch["turn_rewards"], ends)
    torch.testing.assert_close(end_rewards(batch, batch["rewards"]).float(), ends)

    def expected(**options: bool) -> torch.Tensor:
        return turn_advantages(returns, turns, batch["rewards"], ids, **options)

    same = torch.testing.assert_close
    same(found(world, "turn"), expected(std=True))
    same(found(world, "turn", advantage_std=False), expected())
    same(found(world, "turn", advantage="rloo"), expected(leave_one_out=True))
    wanted = whitened(expected(), batch["loss_mask"])
    same(found(world, "turn", advantage="reinforce_pp_baseline"), wanted)
    to_go = rewards_to_go(
        ends,
        torch.zeros(batch.num_tokens),
        batch.lengths,
        batch["loss_mask"],
        kl_coef=0.0,
        turn_rewards=batch["turn_rewards"],
    )
    wanted = whitened(to_go, batch["loss_mask"])
    same(found(world, "turn", advantage="reinforce_pp"), wanted)
    assert not torch.equal(found(world, "turn"), found(world, "trajectory"))
    # the room that a trajectory takes counts what was given: 4, 6, 1 and 3 tokens of 12
    shorter = found(world, "trajectory", advantage_std=False, overlong_buffer=8)
    fines = torch.tensor([0.0, -2 / 8, 0.0, 0.0])
    own = batch["rewards"] + fines
    centred = own - torch.tensor([own[:2].mean()] * 2 + [own[2:].mean()] * 2)
    same(shorter, centred.repeat_interleave(batch.lengths) * batch["loss_mask"])


def test_each_estimate_is_of_turns() -> None:
    run_ranks(all_of, 1)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_rows_without_turns_keep_the_credit_of_trajectories(advantage: str) -> None:
    run_ranks(without_turns, 1, advantage)


def without_turns(world: World, advantage: str) -> None:
    batch = rows()
    batch = batch.keep([name for name in batch.columns() if name != "turn_rewards"])
    ways = [AlgorithmSection(credit=c, advantage=advantage) for c in ("turn", "trajectory")]
    one, other = (token_advantages(batch, own, 12) for own in ways)
    assert torch.equal(one, other)
