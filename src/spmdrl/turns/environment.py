"""`TurnEnvironment`: what a user writes to answer a model's turns. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = Mapping[str, Any]
"""A message of a chat: `role`, `content`, and what else the chat template reads."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Answer to a turn.

    Args:
        messages: messages after the turn, which the model reads next, of any role but `assistant`;
            without one, the sample ends.
        reward: reward of the turn.
        done: whether the sample ends with the turn; its messages are then not read.
        metrics: counts of the turn, such as its calls of tools; they are summed over a sample's
            turns. `tool_calls` and `valid_calls` are those of the shipped `tools`.
    """

    messages: Sequence[Message] = ()
    reward: float = 0.0
    done: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class TurnEnvironment(Protocol):
    """A class of which every sample has an object, in a worker process of its rollout's ranks.

    The class is given as `rollout.turns.kind: module:Class` and made with `rollout.turns.options`
    as its keyword arguments. It is plain synchronous Python. Results do not depend on layout and
    placement where `start` depends on the row alone, and `step` on the row and the turns before.

    A class may also have

    - `tools()`, which returns functions or JSON schemas that the chat template is given; functions
      have type hints and docstrings as `transformers.utils.get_json_schema` reads them;
    - `save()`, which returns the object's state as bytes, and `load(state)`, called instead of
      `start` for a sample that resumes. Without them its turns are stepped through again;
    - `close()`, called when its sample has ended;
    - `special_tokens = True`: `step` is then given the special tokens of a turn as well.
    """

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """Begin a sample; returns the messages of its prompt, equal for all samples of a row.

        Args:
            row: columns of the row of the data; `messages` are those of its prompt, as the section
                of the data makes them (`system`, `template`).
        """

    def step(self, response: str) -> Observation:
        """Answer a turn.

        Args:
            response: the text that the model wrote in it, without its end.
        """
