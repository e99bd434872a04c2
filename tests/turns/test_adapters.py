"""Games and tasks of other packages as turns, which depend on the row alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from spmdrl.turns.adapters.gymnasium import GymnasiumGame
from spmdrl.turns.adapters.own_random import seed_of
from spmdrl.turns.adapters.reasoning_gym import ReasoningGymFeedback
from spmdrl.turns.adapters.textarena import TextArenaGame
from spmdrl.turns.environment import Observation

GAME = "GuessTheNumber-v0"


def texts(game: Any, row: Mapping[str, Any], moves: Sequence[str]) -> list[tuple[str, float]]:
    """Play, and return what was said with the rewards."""
    said = [(str(message["content"]), 0.0) for message in game.start(row)]
    for move in moves:
        found: Observation = game.step(move)
        said.append((" ".join(str(m["content"]) for m in found.messages), found.reward))
        if found.done:
            break
    return said


def guesses(seed: int) -> list[tuple[str, float]]:
    """Halve the range until the number is found."""
    game = TextArenaGame(GAME)
    game.start({"seed": seed})
    low, high, found = 1, 20, []
    while True:
        middle = (low + high) // 2
        turn = game.step(f"I guess [{middle}].")
        found.append((str(middle), turn.reward))
        if turn.done:
            assert turn.metrics == {"ended_by_invalid_move": 0.0}
            return found
        if "lower" in str(turn.messages[0]["content"]):
            high = middle - 1
        else:
            low = middle + 1


def test_a_game_of_textarena_is_won_by_the_reward_that_it_gives():
    plays = [guesses(seed) for seed in range(6)]
    assert all(play[-1][1] == 1.0 and len(play) <= 5 for play in plays)
    assert len({play[-1][0] for play in plays}) > 2  # other seeds, other numbers
    first = TextArenaGame(GAME, system="Be brief.").start({"seed": 1})
    assert [m["role"] for m in first] == ["system", "user"]
    assert "between 1 and 20" in first[1]["content"]
    assert "between 1 and 5" in TextArenaGame(GAME, {"max_number": 5}).start({})[0]["content"]


def test_a_move_that_the_game_does_not_take_twice_ends_it():
    game = TextArenaGame(GAME)
    game.start({"seed": 0})
    assert "invalid move" in game.step("what?").messages[0]["content"]
    ended = game.step("what?")
    assert ended.done and ended.metrics == {"ended_by_invalid_move": 1.0}


@pytest.mark.parametrize("name", [GAME, "2048-v0-3x3"])
def test_games_depend_on_the_row_alone(name: str) -> None:
    moves = ["[3]", "[11]", "[17]"] if name == GAME else ["[Up]", "[Left]", "[Down]", "[Right]"]
    alone = texts(TextArenaGame(name), {"seed": 7}, moves)
    other, again = TextArenaGame(name), TextArenaGame(name)
    other.start({"seed": 8})
    python, numbers = random.getstate(), np.random.get_state()[1].tolist()
    said = [(str(message["content"]), 0.0) for message in again.start({"seed": 7})]
    for move in moves:  # another game draws in between
        other.step(move)
        found = again.step(move)
        said.append((" ".join(str(m["content"]) for m in found.messages), found.reward))
        if found.done:
            break
    assert said == alone
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (python, numbers)
    assert texts(TextArenaGame(name), {"seed": 9}, moves) != alone


def test_wrong_options_of_a_game_are_refused():
    with pytest.raises(ValueError, match=r"options\.game=None-v9: textarena has no such game"):
        TextArenaGame("None-v9")
    with pytest.raises(ValueError, match="GuessTheNumber-v0 is made with them"):
        TextArenaGame(GAME, {"speed": 3})


class Doors:
    """A text game with Gymnasium's interface: one of three doors is right."""

    def __init__(self, tries: int = 2) -> None:
        self.tries = tries
        self.closed = False

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self.right, self.left = random.randint(1, 3), self.tries
        return f"Which door? ({seed})", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        won = action.strip() == str(self.right)
        return "Open." if won else "Shut.", float(won), won, not won and self.left == 0, {}

    def close(self) -> None:
        self.closed = True


def test_an_environment_of_gymnasiums_interface_takes_turns():
    def made() -> GymnasiumGame:
        return GymnasiumGame(f"{__file__}:Doors", {"tries": 3})

    plays = [texts(made(), {"seed": 4}, ["1", "2", "3"]) for _ in range(2)]
    assert plays[0] == plays[1] and plays[0][-1] == ("Open.", 1.0)
    assert plays[0][0] == ("Which door? (4)", 0.0)
    lost = texts(GymnasiumGame(f"{__file__}:Doors"), {"seed": 4}, ["0", "0", "0"])
    assert lost == [("Which door? (4)", 0.0), ("Shut.", 0.0), ("Shut.", 0.0)]
    game = made()
    game.close()
    assert game._game.closed
    with pytest.raises(ValueError, match=r"options\.environment=.*Doors is made with"):
        GymnasiumGame(f"{__file__}:Doors", {"speed": 1})


def test_a_seed_is_the_rows_column_or_made_of_the_row():
    assert seed_of({"seed": 12, "x": 1}) == 12
    assert seed_of({"x": 1, "y": 2}) == seed_of({"y": 2, "x": 1}) != seed_of({"x": 2, "y": 2})
    for wrong in (-1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="the row's seed is"):
            seed_of({"seed": wrong})


def test_a_wrong_answer_to_a_task_may_be_given_again():
    from reasoning_gym import create_dataset

    parameters = {"min_terms": 2, "max_terms": 2}
    item = create_dataset("basic_arithmetic", size=1, seed=3, **parameters)[0]
    task = {"task": "basic_arithmetic", "parameters": parameters}
    row = {**item, "reasoning_gym": task, "messages": [{"role": "user", "content": "?"}]}

    def play(*answers: str) -> list[tuple[str, float]]:
        return texts(ReasoningGymFeedback(attempts=2, feedback="No."), row, answers)[1:]

    right = str(item["answer"])
    assert play(right) == [("", 1.0)]
    assert play("none", f"<answer>{right}</answer>") == [("No.", 0.0), ("", 1.0)]
    assert play("none", "none", right) == [("No.", 0.0), ("", 0.0)]
    with pytest.raises(ValueError, match="needs rows of a source reasoning_gym:TASK"):
        ReasoningGymFeedback().start({"messages": []})
    with pytest.raises(ValueError, match="attempts=0: it must be at least 1"):
        ReasoningGymFeedback(attempts=0)
    with pytest.raises(ValueError, match="enough=0: it must be above 0"):
        ReasoningGymFeedback(enough=0)
