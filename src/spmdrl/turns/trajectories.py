"""`EnvironmentCall`: the turns of one call, answered by objects in worker processes.

Every sample has an object, made when its first turn has ended. Nothing here waits while the engine
computes. What a model reads does not depend on the workers: an object that was lost with its
worker is made again and brought to where it was (by its saved state, or by its own turns again),
and so are those of a call that resumes.
"""

from __future__ import annotations

import base64
import json
import logging
import reprlib
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from spmdrl.rollout.protocol import Answer, Completion, Ending, Finish, Request, Turn
from spmdrl.turns.environment import Message
from spmdrl.turns.settings import TurnsSettings
from spmdrl.turns.workers import Held, Reply, Workers

log = logging.getLogger(__name__)

_CLOSE_S = 5.0
"""Seconds that the end of a call waits for objects to close, before their workers end."""

_TURNS = struct.Struct("<I")  # number of turns before a saved state, in front of it

REPEATABLE = ("exception", "returned")
"""Reasons of a failure that do not depend on time, memory or other objects."""


class Renderer(Protocol):
    """Tokens of messages, and texts of turns."""

    def observation(self, messages: Sequence[Message], *, ended: bool) -> list[int]:
        """Return the tokens that follow a turn and begin the next one.

        Args:
            ended: whether the turn's tokens end with the template's end of a turn.
        """

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a turn's tokens end with the template's end of a turn."""

    def text(self, tokens: Sequence[int], *, special: bool) -> str:
        """Return the text of a turn without its end; its special tokens if `special`."""


@dataclass(frozen=True, kw_only=True)
class _Past:
    """A turn that was answered.

    Args:
        tokens: those that were drawn.
        given: the answer's.
        end: number of the sample's tokens with both.
    """

    tokens: tuple[int, ...]
    text: str
    given: tuple[int, ...]
    end: int


@dataclass(kw_only=True, eq=False)
class _Sample:
    """A sample of the call.

    Args:
        row: its row of the data.
        opening: digest of the messages that its object must begin with.
        past: its answered turns.
        state: the object's state after them, if the class saves it.
        turn: the turn that waits for an answer, and its text.
        since: time at which its first turn of this call had ended.
    """

    request: Request
    where: tuple[int, int]
    row: Mapping[str, Any]
    opening: str
    past: list[_Past]
    state: bytes | None = None
    held: Held | None = None
    turn: Turn | None = None
    text: str = ""
    since: float | None = None
    is_over: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """Prompt id and sample index."""
        return self.request.prompt_id, self.where[1]


class EnvironmentCall:
    """The `Turns` of one call."""

    def __init__(
        self,
        workers: Workers,
        renderer: Renderer,
        settings: TurnsSettings,
        requests: Sequence[Request],
        entries: Sequence[str],
        states: Mapping[tuple[int, int], bytes],
    ) -> None:
        self._workers, self._renderer, self._settings = workers, renderer, settings
        self._held: dict[Held, _Sample] = {}
        self._counts: Counter[str] = Counter()
        self._metrics: dict[str, float] = {}
        self._reasons: dict[str, str] = {}
        self._heard: dict[tuple[int, int], dict[int, str]] = {}
        self._samples: dict[tuple[int, int], _Sample] = {}
        for index, (request, entry) in enumerate(zip(requests, entries, strict=True)):
            known = json.loads(entry)
            for place, number in enumerate(request.samples):
                begun = request.begun[place] if request.begun else None
                sample = _Sample(
                    request=request,
                    where=(index, number),
                    row=known["row"],
                    opening=known["opening"],
                    past=[] if begun is None else self._past(begun),
                    is_over=begun is not None and begun.finish is not Finish.ABORTED,
                )
                sample.state = _usable(states.get(sample.key), len(sample.past))
                self._samples[sample.where] = sample

    def ended(self, turn: Turn) -> None:
        """See `Turns.ended`."""
        sample = self._samples[turn.request, turn.sample]
        assert turn.number == len(sample.past), (turn.number, len(sample.past))
        sample.turn, sample.text = turn, self._text(turn.tokens)
        if sample.since is None:
            sample.since = time.monotonic()
        self._ask(sample)

    def answers(self, wait_s: float) -> Sequence[Answer]:
        """See `Turns.answers`.

        Raises:
            ValueError: `start` fails, or gives other messages than it did for the row's prompt.
        """
        deadline = time.monotonic() + wait_s
        while True:
            replies = self._workers.poll(max(0.0, deadline - time.monotonic()))
            found = [answer for reply in replies if (answer := self._take(reply)) is not None]
            if found or time.monotonic() >= deadline:
                return found

    def states(self) -> Mapping[tuple[int, int], bytes]:
        """See `Turns.states`; only classes with `save` have any."""
        return {
            sample.key: _TURNS.pack(len(sample.past)) + sample.state
            for sample in self._samples.values()
            if sample.state is not None and not sample.is_over
        }

    def heard(self) -> Mapping[tuple[int, int], Mapping[int, str]]:
        """See `Turns.heard`."""
        return self._heard

    def counts(self) -> Mapping[str, int]:
        """See `EnvironmentTurns.counts`."""
        names = [*(ending.text for ending in Ending), "restarted", "remade"]
        return {name: self._counts[name] for name in names}

    def metrics(self) -> Mapping[str, float]:
        """See `EnvironmentTurns.metrics`."""
        return self._metrics

    def close(self) -> None:
        """Close all objects, and log what has failed."""
        for sample in self._samples.values():
            self._let_go(sample)
        deadline = time.monotonic() + _CLOSE_S
        while self._workers.is_busy and time.monotonic() < deadline:
            for reply in self._workers.poll(min(0.5, _CLOSE_S)):
                self._take(reply)
        for what, reason in self._reasons.items():
            log.warning(
                "%s.kind=%s: %d %s, the first one because: %s",
                *(self._settings.key, self._settings.kind, self._counts[what], _WORDS[what]),
                reason,
            )

    # Asking

    def _ask(self, sample: _Sample) -> None:
        """Ask the sample's object for the answer to its turn; it is made if there is none."""
        if sample.held is None:
            self._make(sample)
        assert sample.held is not None
        self._workers.ask(sample.held, ("turn", 0), "step", text=sample.text)

    def _make(self, sample: _Sample) -> None:
        held = sample.held = self._workers.make()
        self._held[held] = sample
        if sample.state is not None:
            state = base64.b64encode(sample.state).decode()
            self._workers.ask(held, ("load", 0), "load", state=state)
            return
        self._workers.ask(held, ("start", 0), "start", row=sample.row, tools=False)
        for number, past in enumerate(sample.past):
            self._workers.ask(held, ("again", number), "step", text=past.text)

    def _let_go(self, sample: _Sample) -> None:
        """Close the sample's object."""
        held, sample.held = sample.held, None
        if held is not None:
            del self._held[held]
            if not held.is_lost:
                self._workers.ask(held, ("close", 0), "close")

    # Replies

    def _take(self, reply: Reply) -> Answer | None:
        what, number = reply.tag or ("", 0)
        if what == "close":
            self._workers.drop(reply.held)
            if reply.reason:
                self._note("unclosed", reply.message)
            return None
        sample = self._held.get(reply.held)
        if sample is None:  # an object that was let go
            return None
        if reply.is_last:
            del self._held[reply.held]
            sample.held = None
        if reply.reason == "lost":
            self._counts["remade"] += 1
            if sample.turn is not None:
                self._ask(sample)
            return None
        if reply.reason:
            return self._failed(sample, what, reply)
        if what == "start":
            self._check_start(sample, reply.value)
        elif what == "again":
            return self._compare(sample, sample.past[number], reply.value)
        elif what == "turn":
            return self._answer(sample, reply.value)
        return None

    def _failed(self, sample: _Sample, what: str, reply: Reply) -> Answer:
        if reply.reason in REPEATABLE:
            if what == "start":
                raise ValueError(start_failed(self._settings, sample.row, reply))
            if what != "turn":
                return self._restart(sample, reply.message)
        self._reasons.setdefault(Ending.FAILED.text, f"{reply.reason}: {reply.message}")
        return self._end(sample, Ending.FAILED, self._settings.failed_reward)

    def _check_start(self, sample: _Sample, value: Mapping[str, Any]) -> None:
        if digest_of(value["messages"]) != sample.opening:
            shown = reprlib.repr(value["messages"])
            raise ValueError(
                f"{self._settings.key}.kind={self._settings.kind}: start gave other messages for "
                f"the same row, now {shown}: they must depend on the row alone, whose samples "
                "share one prompt"
            )

    def _compare(self, sample: _Sample, past: _Past, value: Mapping[str, Any]) -> Answer | None:
        """Compare the answer to a turn with the one that the model has read."""
        given = self._given(past.tokens, value) if value["messages"] else ()
        if given == past.given:
            return None
        return self._restart(sample, "a turn was answered differently when it was taken again")

    def _restart(self, sample: _Sample, why: str) -> Answer:
        self._note("restarted", why)
        self._let_go(sample)
        self._heard.pop(sample.key, None)
        sample.past, sample.state, sample.turn, sample.since = [], None, None, None
        return Answer(request=sample.where[0], sample=sample.where[1], restarts=True)

    def _answer(self, sample: _Sample, value: Mapping[str, Any]) -> Answer:
        turn, reward = sample.turn, float(value["reward"])
        assert turn is not None and sample.since is not None
        for name, number in value["metrics"].items():
            self._metrics[name] = self._metrics.get(name, 0.0) + number
        if not value["messages"]:
            return self._end(sample, Ending.DONE, reward)
        if turn.number + 1 >= self._settings.max_turns:
            return self._end(sample, Ending.TURNS, reward)
        limit = self._settings.seconds
        if limit is not None and time.monotonic() - sample.since > limit:
            return self._end(sample, Ending.SECONDS, reward)
        given = self._given(turn.tokens, value)
        end = (sample.past[-1].end if sample.past else 0) + len(turn.tokens) + len(given)
        left = sample.request.room - end
        if left < 1:
            return self._end(sample, Ending.ROOM, reward)
        past = _Past(tokens=turn.tokens, text=sample.text, given=given, end=end)
        sample.past.append(past)
        self._heard.setdefault(sample.key, {})[turn.number] = json.dumps(value["messages"])
        state = value.get("state")
        sample.state, sample.turn = None if state is None else base64.b64decode(state), None
        return Answer(
            request=turn.request,
            sample=turn.sample,
            tokens=given,
            max_tokens=min(sample.request.sampling.max_tokens, left),
            reward=reward,
        )

    def _end(self, sample: _Sample, ending: Ending, reward: float) -> Answer:
        self._counts[ending.text] += 1
        self._let_go(sample)
        sample.turn, sample.is_over = None, True
        request, number = sample.where
        return Answer(request=request, sample=number, ending=ending, reward=reward)

    def _note(self, what: str, reason: str) -> None:
        """Count what has happened, and keep the first reason, for the log."""
        self._counts[what] += 1
        self._reasons.setdefault(what, reason)

    # Tokens

    def _text(self, tokens: Sequence[int]) -> str:
        return self._renderer.text(tokens, special=self._workers.about.special_tokens)

    def _given(self, tokens: Sequence[int], value: Mapping[str, Any]) -> tuple[int, ...]:
        ended = self._renderer.ends(tokens)
        return tuple(self._renderer.observation(value["messages"], ended=ended))

    def _past(self, begun: Completion) -> list[_Past]:
        """Return the answered turns of a sample that was begun."""
        found, start = [], 0
        for first, last in begun.given:
            tokens = begun.tokens[start:first]
            given = begun.tokens[first:last]
            found.append(_Past(tokens=tokens, text=self._text(tokens), given=given, end=last))
            start = last
        return found


_WORDS = {
    "failed": "samples ended with a turn that could not be answered",
    "restarted": "samples started again",
    "unclosed": "objects could not be closed",
}


def digest_of(messages: Sequence[Message]) -> str:
    """Digest of messages."""
    text = json.dumps(list(messages), sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def start_failed(settings: TurnsSettings, row: Mapping[str, Any], reply: Reply) -> str:
    """Text of an error: `start` has failed for a row."""
    shown = json.dumps(row)
    shown = shown if len(shown) <= 300 else f"{shown[:300]} ..."
    why = reply.message if reply.reason in REPEATABLE else f"start failed: {reply.message}"
    return f"{settings.key}.kind={settings.kind}, at the row {shown}: {why}"


def _usable(state: bytes | None, num_turns: int) -> bytes | None:
    """Return a saved state if it is the one after this many turns."""
    if state is None or _TURNS.unpack_from(state)[0] != num_turns:
        return None
    return state[_TURNS.size :]
