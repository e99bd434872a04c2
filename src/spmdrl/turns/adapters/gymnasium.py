"""`gymnasium`: an environment with Gymnasium's interface whose observations and actions are texts.

Towers et al. 2024, arXiv:2407.17032: `reset(seed=...)` gives an observation and details,
`step(action)` an observation, a reward, whether the episode ended or was cut, and details.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.config.user_objects import make_object, may_have
from spmdrl.turns.adapters.own_random import OwnRandom, seed_of
from spmdrl.turns.environment import Message, Observation

_KEY = "rollout.turns.options"


class GymnasiumGame:
    """Turns with an object that has `reset` and `step`; the turn's text is the action.

    Args:
        environment: place of a class or function that makes the object: `module:Class`,
            `path/to/file.py:Class`; `gymnasium:make` takes `id` as an option.
        options: its keyword arguments.
        system: text of a system message; None: no such message.

    Raises:
        ValueError: it cannot be made.
    """

    def __init__(
        self,
        environment: str,
        options: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        keys = f"{_KEY}.environment", f"{_KEY}.options"
        self._game = make_object(environment, options or {}, *keys)
        self._system = system
        self._random = OwnRandom(0)

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """Reset the object by the row's seed; the observation is the user's first message."""
        seed = seed_of(row)
        self._random = OwnRandom(seed)
        with self._random.used():
            observation, _ = self._game.reset(seed=seed)
        first: list[Message] = [{"role": "user", "content": str(observation)}]
        if self._system is None:
            return first
        return [{"role": "system", "content": self._system}, *first]

    def step(self, response: str) -> Observation:
        """Give the text as the action."""
        with self._random.used():
            observation, reward, ended, cut, _ = self._game.step(response)
        messages = [{"role": "user", "content": str(observation)}]
        return Observation(messages=messages, reward=float(reward), done=bool(ended or cut))

    def close(self) -> None:
        """Close the object, if it can be closed."""
        if may_have(type(self._game), "close"):
            self._game.close()
