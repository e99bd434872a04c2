"""A renderer whose texts are numbers, and an engine without a model, for tests of turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spmdrl.rollout.protocol import (
    Completion,
    Ending,
    Finish,
    Request,
    SamplingParams,
    Turn,
    Turns,
)
from spmdrl.turns.call import EnvironmentTurns, Opening
from spmdrl.turns.environment import Message
from spmdrl.turns.settings import TurnsSettings

END = 2
TOYS = Path(__file__).parent / "toy_environments.py"


class Numbers:
    """Text of tokens: their numbers. An observation begins with 3, or with END and 3."""

    def opening(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        return [5, *(int(n) for m in messages for n in m["content"].split())]

    def reads_alike(self, tokens: Sequence[int], others: Sequence[int]) -> bool:
        return list(tokens) == list(others)

    def observation(self, messages: Sequence[Message], *, ended: bool) -> list[int]:
        head = [3] if ended else [END, 3]
        return head + [int(n) % 120 for m in messages for n in m["content"].split()]

    def ends(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] == END

    def text(self, tokens: Sequence[int], *, special: bool) -> str:
        kept = tokens if special or not self.ends(tokens) else tokens[:-1]
        return " ".join(map(str, kept))


def settings(kind: str = "Counting", **values: Any) -> TurnsSettings:
    return TurnsSettings(kind=f"{TOYS}:{kind}", **{"timeout_s": 5.0, "memory_mb": 512, **values})


def rows_of(count: int, **values: Any) -> list[dict[str, Any]]:
    return [{"number": 30 + i, **values} for i in range(count)]


def requests_of(
    openings: Sequence[Opening], samples: int = 2, max_tokens: int = 6, room: int = 60
) -> list[Request]:
    sampling = SamplingParams(max_tokens=max_tokens)
    return [
        Request(
            tokens=tuple(Numbers().opening(opening.messages, opening.tools)),
            prompt_id=100 + i,
            samples=tuple(range(samples)),
            sampling=sampling,
            room=room,
        )
        for i, opening in enumerate(openings)
    ]


def draw(context: Sequence[int], limit: int) -> tuple[int, ...]:
    """Tokens that depend on the context, as an engine's do."""
    total = sum(context) + len(context)
    tokens = tuple((total + 7 * k) % 90 + 6 for k in range(1 + total % limit))
    return (*tokens[:-1], END) if total % 3 else tokens


class Play:
    """An engine without a model: draws the turns of a call as soon as they may be drawn.

    Args:
        draw: makes a turn from its context and the most tokens that it may have.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        turns: Turns,
        draw: Callable[[Sequence[int], int], tuple[int, ...]] = draw,
    ) -> None:
        self.requests, self.turns, self.draw = requests, turns, draw
        self.parts: dict[tuple[int, int], list[int]] = {}
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.given: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.rewards: dict[tuple[int, int], list[float]] = {}
        self.endings: dict[tuple[int, int], Ending] = {}
        self.restarted: list[tuple[int, int]] = []
        self.waits: set[tuple[int, int]] = set()

    def run(self, most: int = 10**6, turns: int = 0) -> Play:
        """Run until all samples have ended, or after `most` answers, or once each sample has had
        so many `turns` answered.
        """
        for i, request in enumerate(self.requests):
            for place, sample in enumerate(request.samples):
                begun = request.begun[place] if request.begun else None
                if begun is not None and begun.finish is not Finish.ABORTED:
                    continue
                where = (i, sample)
                self.tokens[where] = [] if begun is None else list(begun.tokens)
                self.given[where] = [] if begun is None else list(begun.given)
                self.parts[where] = [] if begun is None else list(begun.parts)
                self.rewards[where] = [] if begun is None else list(begun.rewards)
                self._turn(where, begun is not None and begun.waits is not None)
        while self.waits and most > 0:
            if turns and all(len(given) >= turns for given in self.given.values()):
                break
            answers = self.turns.answers(0.2)
            most -= len(answers)
            for answer in answers:
                self._answered(answer)
        return self

    def context(self, where: tuple[int, int]) -> list[int]:
        """Tokens that the model reads, with what it has drawn of a turn."""
        own, parts = self.tokens[where], self.parts[where]
        return own[parts[-1] :] if parts else [*self.requests[where[0]].tokens, *own]

    def _turn(self, where: tuple[int, int], is_drawn: bool = False, limit: int = 6) -> None:
        own, given = self.tokens[where], self.given[where]
        if not is_drawn:
            own += self.draw(self.context(where), limit)
        start = given[-1][1] if given else 0
        turn = Turn(
            request=where[0],
            sample=where[1],
            number=len(given),
            tokens=tuple(own[start:]),
            finish=Finish.STOP if own[-1] == END else Finish.LENGTH,
        )
        self.waits.add(where)
        self.turns.ended(turn)

    def _answered(self, answer: Any) -> None:
        where = (answer.request, answer.sample)
        assert where in self.waits, answer
        self.waits.remove(where)
        if answer.restarts:
            self.tokens[where], self.given[where], self.rewards[where] = [], [], []
            self.parts[where] = []
            self.restarted.append(where)
            self._turn(where)
            return
        self.rewards[where].append(answer.reward)
        if answer.max_tokens == 0:
            self.endings[where] = answer.ending
            return
        first = len(self.tokens[where])
        self.tokens[where] += answer.tokens
        self.given[where].append((first, len(self.tokens[where])))
        self.parts[where] += [first] * answer.begins_part
        assert len(self.tokens[where]) + answer.max_tokens <= self.requests[where[0]].room
        self._turn(where, limit=answer.max_tokens)

    def result(self) -> dict[tuple[int, int], Any]:
        return {
            where: (tuple(self.tokens[where]), self.given[where], self.rewards[where], ending)
            for where, ending in self.endings.items()
        }

    def begun(self) -> list[Request]:
        """The requests of a call that resumes this one."""
        found = []
        for i, request in enumerate(self.requests):
            begun = [self._completion((i, sample)) for sample in request.samples]
            found.append(Request(**{**vars(request), "begun": tuple(begun)}))
        return found

    def _completion(self, where: tuple[int, int]) -> Completion:
        tokens = tuple(self.tokens[where])
        ending = self.endings.get(where)
        return Completion(
            tokens=tokens,
            logprobs=(0.0,) * len(tokens),
            finish=Finish.ABORTED if ending is None else ending.finish,
            given=tuple(self.given[where]),
            parts=tuple(self.parts[where]),
            waits=Finish.STOP if where in self.waits else None,
            rewards=tuple(self.rewards[where]),
            ending=ending,
        )


def play(source: EnvironmentTurns, rows: Sequence[Mapping[str, Any]], **asked: Any) -> Play:
    """One call with a sample for each row."""
    openings = source.openings(rows)
    requests = requests_of(openings, **asked)
    with source.open(requests, [opening.entry for opening in openings]) as turns:
        return Play(requests, turns).run()
