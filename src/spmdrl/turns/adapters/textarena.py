"""`textarena`: games of the package TextArena for one player (Guertler et al. 2025,
arXiv:2504.11442).

Games that need word lists (Wordle, Hangman) fetch them by nltk when they are made; the others work
without a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.turns.adapters.own_random import OwnRandom, seed_of
from spmdrl.turns.environment import Message, Observation

_KEY = "rollout.turns.options"
_PLAYER = 0


class TextArenaGame:
    """Turns of one game; its reward at the end is the sample's.

    The model reads what the game says after each move; the history, which it has anyway, is not
    repeated.

    Args:
        game: id of the game, such as `Mastermind-v0`.
        options: keyword arguments of the game, which its id gives otherwise.
        system: text of a system message; None: no such message.

    Raises:
        ValueError: the package is missing, has no such game, or the options are wrong.
    """

    def __init__(
        self, game: str, options: Mapping[str, Any] | None = None, system: str | None = None
    ) -> None:
        # it has agents of several vendors in it, and takes a second to import
        try:
            import textarena
        except ImportError as error:
            raise ValueError(
                f"{_KEY}.game={game}: it needs the package textarena (pip install "
                f"spmdrl[textarena]): {error}"
            ) from None
        from textarena.envs.registration import ENV_REGISTRY

        name = game if game.endswith("-raw") else f"{game}-raw"  # without the history
        if name not in ENV_REGISTRY:
            raise ValueError(f"{_KEY}.game={game}: textarena has no such game")
        try:
            self._game: Any = textarena.make(name, **(options or {}))
        except TypeError as error:
            raise ValueError(
                f"{_KEY}.options={options}: {game} is made with them: {error}"
            ) from None
        self._system = system
        self._random = OwnRandom(0)

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """Begin the game by the row's seed; what it says is the user's first message."""
        seed = seed_of(row)
        self._random = OwnRandom(seed)
        with self._random.used():
            self._game.reset(num_players=1, seed=seed)
        first: list[Message] = [{"role": "user", "content": self._said()}]
        if self._system is None:
            return first
        return [{"role": "system", "content": self._system}, *first]

    def step(self, response: str) -> Observation:
        """Make the move that the text names."""
        with self._random.used():
            is_over, _ = self._game.step(response)
        if not is_over:
            return Observation(messages=[{"role": "user", "content": self._said()}])
        rewards, about = self._game.close()
        wrong = bool(about[_PLAYER].get("invalid_move", False))
        return Observation(
            reward=float((rewards or {}).get(_PLAYER, 0.0)),
            done=True,
            metrics={"ended_by_invalid_move": float(wrong)},
        )

    def _said(self) -> str:
        """Text of what the game has said since the last move, without the move itself."""
        _, heard = self._game.get_observation()
        texts = [text for sender, text, _ in heard if sender != _PLAYER]
        return "\n".join(text.strip() for text in texts) or "(nothing)"
