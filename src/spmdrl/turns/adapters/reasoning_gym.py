"""`reasoning_gym`: tasks of reasoning-gym (arXiv:2505.24760) with feedback: the model answers, is
told that it is wrong, and tries again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from spmdrl.rewards.functions import reasoning_gym
from spmdrl.turns.environment import Message, Observation

_KEY = "rollout.turns.options"
WRONG = "That is not right. Try again."

# the objects of a process share the tasks that score
_scorer = cache(lambda extract: reasoning_gym(extract=extract))


class ReasoningGymFeedback:
    """Turns on one item of a source `reasoning_gym:TASK`; the last turn's reward is its score.

    Args:
        attempts: most answers.
        enough: score at which an answer is right, above 0 and at most 1.
        feedback: text of the message after a wrong answer.
        extract: text that is scored: `tag`, `number` or `whole`, as in the reward `reasoning_gym`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        attempts: int = 3,
        enough: float = 1.0,
        feedback: str = WRONG,
        extract: str = "tag",
    ) -> None:
        if attempts < 1:
            raise ValueError(f"{_KEY}.attempts={attempts}: it must be at least 1")
        if not 0 < enough <= 1:
            raise ValueError(f"{_KEY}.enough={enough}: it must be above 0 and at most 1")
        self._score = _scorer(extract)
        self._left, self._enough, self._feedback = attempts, enough, feedback
        self._row: Mapping[str, Any] = {}

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """Return the messages of the row's prompt.

        Raises:
            ValueError: the row is not of a reasoning-gym task.
        """
        if "reasoning_gym" not in row:
            raise ValueError(
                "rollout.turns.kind=reasoning_gym needs rows of a source reasoning_gym:TASK"
            )
        self._row = row
        return list(row["messages"])

    def step(self, response: str) -> Observation:
        """Score an answer; the sample ends if it is right, or was the last one allowed."""
        score = self._score("", response, None, self._row)
        assert isinstance(score, float), score  # no further metrics
        self._left -= 1
        if score >= self._enough or self._left == 0:
            return Observation(reward=score, done=True)
        return Observation(messages=[{"role": "user", "content": self._feedback}])
