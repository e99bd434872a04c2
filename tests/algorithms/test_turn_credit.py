"""Advantages of turns, by hand; and rewards and GAE of rows with given tokens between turns."""

from __future__ import annotations

import pytest
import torch

from spmdrl.algorithms.advantages import group_advantages, leave_one_out, rewards_to_go
from spmdrl.algorithms.packed import last_tokens
from spmdrl.algorithms.reward_shaping import token_rewards
from spmdrl.algorithms.turn_credit import (
    turn_advantages,
    turn_returns,
    turn_tokens,
)
from spmdrl.algorithms.value_loss import gae

# a letter is a token: p prompt, o given; digits are sampled, their number is the turn
ROWS = ("pp00o1", "p0ooo11o2", "p00", "pp0o1")
LENGTHS = torch.tensor([len(row) for row in ROWS])
MASK = torch.tensor([letter.isdigit() for row in ROWS for letter in row])
PROMPTS = torch.tensor([7, 7, 7, 9])
EACH = [[1.0, 2.0], [0.0, 4.0, 1.0], [3.0], [5.0, 6.0]]
END = torch.tensor([0.5, 0.0, 1.0, 0.0])


def columns() -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards at the turns' last tokens, and those of rows."""
    found = []
    for row, rewards in zip(ROWS, EACH, strict=True):
        for i, letter in enumerate(row):
            is_last = letter.isdigit() and row[i + 1 : i + 2] != letter
            found.append(rewards[int(letter)] if is_last else 0.0)
    return torch.tensor(found), torch.tensor([sum(own) for own in EACH]) + END


def on_turns(values: list[list[float]]) -> torch.Tensor:
    """Each turn's value on its tokens."""
    return torch.tensor(
        [
            own[int(letter)] if letter.isdigit() else 0.0
            for row, own in zip(ROWS, values, strict=True)
            for letter in row
        ]
    )


RETURNS = [[3.5, 2.5], [5.0, 5.0, 1.0], [4.0], [11.0, 6.0]]


def found_returns() -> torch.Tensor:
    return turn_returns(turn_tokens(LENGTHS, MASK), columns()[0], END)


def test_turns_are_the_runs_of_sampled_tokens() -> None:
    turns = turn_tokens(LENGTHS, MASK)
    assert turns.row.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert turns.number.tolist() == [0, 1, 0, 1, 2, 0, 0, 1]
    assert turns.of_token[:6].tolist() == [-1, -1, 0, 0, -1, 1]
    assert found_returns().tolist() == [own for row in RETURNS for own in row]
    none = turn_tokens(torch.tensor([2]), torch.zeros(2, dtype=torch.bool))
    assert len(none.row) == 0 and none.of_token.tolist() == [-1, -1]
    # the end of a row and the begin of the next one are no turn together
    touching = turn_tokens(torch.tensor([2, 2]), torch.ones(4, dtype=torch.bool))
    assert touching.of_token.tolist() == [0, 0, 1, 1] and touching.number.tolist() == [0, 0]


def advantages(**options: bool) -> torch.Tensor:
    turns, (_, rewards) = turn_tokens(LENGTHS, MASK), columns()
    return turn_advantages(found_returns(), turns, rewards, PROMPTS, **options)


def test_a_turn_is_compared_with_the_same_turn_of_its_group() -> None:
    first, second = (3.5 + 5 + 4) / 3, (2.5 + 5) / 2
    centred = [[3.5 - first, 2.5 - second], [5 - first, 5 - second, 0.0], [4 - first], [0.0, 0.0]]
    torch.testing.assert_close(advantages(), on_turns(centred))
    spread = float(torch.tensor([3.5, 5.0, 4.0]).std())
    divided = [[value / (spread + 1e-6) for value in row] for row in centred]
    torch.testing.assert_close(advantages(std=True), on_turns(divided))
    others = [
        [3.5 - (5 + 4) / 2, 2.5 - 5],
        [5 - (3.5 + 4) / 2, 5 - 2.5, 0.0],
        [4 - (3.5 + 5) / 2],
        [0.0, 0.0],
    ]
    torch.testing.assert_close(advantages(leave_one_out=True), on_turns(others))


def test_samples_of_one_turn_have_the_advantages_of_their_trajectories() -> None:
    lengths, rewards = torch.tensor([3, 2, 4, 3]), torch.tensor([0.1, 0.7, 0.2, 0.9])
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1]).bool()
    ids = torch.tensor([1, 1, 1, 1])
    turns = turn_tokens(lengths, mask)
    returns = turn_returns(turns, torch.zeros(12), rewards)
    rows = torch.repeat_interleave(torch.arange(4), lengths)
    for std in (True, False):
        wanted = group_advantages(rewards, ids, std=std)[rows] * mask
        assert torch.equal(turn_advantages(returns, turns, rewards, ids, std=std), wanted)
    wanted = leave_one_out(rewards, ids)[rows] * mask
    found = turn_advantages(returns, turns, rewards, ids, leave_one_out=True)
    assert torch.equal(found, wanted)


def test_equal_returns_and_equal_trajectories_have_no_advantage() -> None:
    turns = turn_tokens(LENGTHS, MASK)
    flat = turn_advantages(torch.full((8,), 0.1).double(), turns, END, PROMPTS)
    assert not flat.any()
    returns = torch.tensor([0.3, 0.1, 0.3, 0.2, 0.0, 0.3, 0.0, 0.0]).double()
    same = torch.full((4,), 0.3)
    assert not turn_advantages(returns, turns, same, PROMPTS, std=True).any()
    assert turn_advantages(returns, turns, same, PROMPTS).any()
    with pytest.raises(ValueError, match=r"rows \[0\] are not finite"):
        turn_advantages(returns.index_fill(0, torch.tensor([1]), torch.nan), turns, same, PROMPTS)


def test_no_row_changes_anothers_advantages() -> None:
    whole = advantages(std=True)
    alone = turn_tokens(LENGTHS[3:], MASK[-5:])
    returns = turn_returns(alone, columns()[0][-5:], END[3:])
    again = turn_advantages(returns, alone, columns()[1][3:], PROMPTS[3:], std=True)
    assert torch.equal(again, whole[-5:])


def without_given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows without what was given between turns: lengths, mask, and the tokens kept."""
    kept = torch.tensor([letter != "o" for row in ROWS for letter in row])
    lengths = torch.tensor([len(row.replace("o", "")) for row in ROWS])
    return lengths, MASK[kept], kept


def test_rewards_and_gae_step_over_given_tokens() -> None:
    torch.manual_seed(0)
    lengths, mask, kept = without_given()
    drift, values = torch.randn(len(MASK)), torch.randn(len(MASK))
    own = token_rewards(END, drift, LENGTHS, MASK, kl_coef=0.3)
    assert torch.equal(own[kept], token_rewards(END, drift[kept], lengths, mask, kl_coef=0.3))
    assert not own[~MASK].any()
    turns = columns()[0]
    shaped = token_rewards(END, drift, LENGTHS, MASK, kl_coef=0.3, turn_rewards=turns)
    torch.testing.assert_close(shaped, own + turns)
    found = gae(shaped, values, LENGTHS, MASK, gamma=0.9, lam=0.8)
    wanted = gae(shaped[kept], values[kept], lengths, mask, gamma=0.9, lam=0.8)
    for column, other in zip(found, wanted, strict=True):
        assert torch.equal(column[kept], other) and not column[~MASK].any()
    # by hand: the last sampled token of turn 0 is followed by the first one of turn 1
    (first, second, third) = [i for i, letter in enumerate(ROWS[0]) if letter.isdigit()]
    a3 = shaped[third] - values[third]
    a2 = shaped[second] + 0.9 * values[third] - values[second] + 0.9 * 0.8 * a3
    a1 = shaped[first] + 0.9 * values[second] - values[first] + 0.9 * 0.8 * a2
    torch.testing.assert_close(found[0][[first, second, third]], torch.stack([a1, a2, a3]))


def test_a_rows_reward_is_at_its_last_sampled_token() -> None:
    ends_given = torch.tensor([False, True, True, False, False])
    rows, places = last_tokens(torch.tensor([5]), ends_given)
    assert (rows.tolist(), places.tolist()) == ([0], [2])
    found = token_rewards(
        torch.tensor([3.0]),
        torch.full((5,), 9.0),
        torch.tensor([5]),
        ends_given,
        kl_coef=0.0,
        turn_rewards=torch.tensor([0.0, 0, 2, 9, 9]),
    )
    assert found.tolist() == [0, 0, 5, 0, 0]


def test_rewards_to_go_count_turns_from_their_end_on() -> None:
    zeros = torch.zeros(len(MASK))
    found = rewards_to_go(END, zeros, LENGTHS, MASK, kl_coef=0.0, turn_rewards=columns()[0])
    assert torch.equal(found, on_turns(RETURNS))
