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
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from spmdrl.rollout.protocol import Answer, Completion, Ending, Finish, Request, Turn
from spmdrl.turns.environment import Message
from spmdrl.turns.past import Given, Past, Renderer, follow, packed, unpacked
from spmdrl.turns.settings import TurnsSettings
from spmdrl.turns.workers import Held, Reply, Workers

log = logging.getLogger(__name__)

_CLOSE_S = 5.0
"""Seconds that the end of a call waits for objects to close, before their workers end."""

REPEATABLE = ("exception", "returned")
"""Reasons of a failure that do not depend on time, memory or other objects."""


@dataclass(kw_only=True, eq=False)
class _Sample:
    """A sample of the call.

    Args:
        known: its `Opening.entry`: `row` of the data, `opening`, the digest of the messages that
            its object must begin with, and for rendered conversations these, and the `tools`.
        past: its answered turns.
        state: the object's state after them, if the class saves it.
        turn: the turn that waits for an answer, and its text.
        since: time at which its first turn of this call had ended.
    """

    request: Request
    where: tuple[int, int]
    known: Mapping[str, Any]
    past: list[Past]
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

    @property
    def row(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.known["row"]
        return found


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
                    known=known,
                    past=[] if begun is None else self._past(begun),
                    is_over=begun is not None and begun.finish is not Finish.ABORTED,
                )
                self._adopt(sample, states.get(sample.key))
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
        renders = self._settings.renders_history
        return {
            sample.key: packed(sample.past, sample.state, with_messages=renders)
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
            return self._compare(sample, number, reply.value)
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
        if digest_of(value["messages"]) != sample.known["opening"]:
            shown = reprlib.repr(value["messages"])
            raise ValueError(
                f"{self._settings.key}.kind={self._settings.kind}: start gave other messages for "
                f"the same row, now {shown}: they must depend on the row alone, whose samples "
                "share one prompt"
            )

    def _compare(self, sample: _Sample, number: int, value: Mapping[str, Any]) -> Answer | None:
        """Compare the answer to a turn with the one that the model has read."""
        past, before = sample.past[number], sample.past[:number]
        given = Given(tokens=())
        if value["messages"]:
            given = self._given(sample, before, past.tokens, past.text, value)
        if given == Given(tokens=past.given, begins_part=past.begins_part):
            sample.past[number] = replace(past, messages=value["messages"])
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
        given = self._given(sample, sample.past, turn.tokens, sample.text, value)
        end = sample.past[-1].end if sample.past else 0
        end += len(turn.tokens) + len(given.tokens)
        left = sample.request.room - end
        if left < 1:
            return self._end(sample, Ending.ROOM, reward)
        past = Past(
            tokens=turn.tokens,
            text=sample.text,
            given=given.tokens,
            end=end,
            begins_part=given.begins_part,
            messages=value["messages"],
        )
        sample.past.append(past)
        self._heard.setdefault(sample.key, {})[turn.number] = json.dumps(value["messages"])
        state = value.get("state")
        sample.state, sample.turn = None if state is None else base64.b64decode(state), None
        return Answer(
            request=turn.request,
            sample=turn.sample,
            tokens=given.tokens,
            max_tokens=min(sample.request.sampling.max_tokens, left),
            reward=reward,
            begins_part=given.begins_part,
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

    def _given(
        self,
        sample: _Sample,
        past: Sequence[Past],
        tokens: Sequence[int],
        text: str,
        value: Mapping[str, Any],
    ) -> Given:
        """Return what follows a turn.

        Args:
            past: the sample's turns before it.
            tokens, text: the turn's.
            value: the answer, with messages.
        """
        return follow(
            self._renderer,
            sample.request.tokens,
            past,
            Past(tokens=tuple(tokens), text=text, given=(), end=0, messages=value["messages"]),
            rendered=sample.known if self._settings.renders_history else None,
        )

    def _adopt(self, sample: _Sample, state: bytes | None) -> None:
        """Take what a stopped call has kept of a sample, if it is the one after its turns."""
        renders = self._settings.renders_history
        sample.state, told = unpacked(state, len(sample.past), with_messages=renders)
        if told is not None:
            both = zip(sample.past, told, strict=True)
            sample.past = [replace(turn, messages=messages) for turn, messages in both]

    def _past(self, begun: Completion) -> list[Past]:
        """Return the answered turns of a sample that was begun."""
        found, start = [], 0
        for first, last in begun.given:
            tokens = begun.tokens[start:first]
            given = begun.tokens[first:last]
            found.append(
                Past(
                    tokens=tokens,
                    text=self._text(tokens),
                    given=given,
                    end=last,
                    begins_part=first in begun.parts,
                )
            )
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
