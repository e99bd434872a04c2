"""`EnvironmentTurns`: turns of a rollout's calls, answered by objects of a user's environment."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from spmdrl.config.user_objects import source_digest
from spmdrl.rewards.server import RewardServer
from spmdrl.rollout.protocol import Request
from spmdrl.turns.environment import Message
from spmdrl.turns.past import Renderer
from spmdrl.turns.settings import TurnsSettings
from spmdrl.turns.trajectories import EnvironmentCall, digest_of, start_failed
from spmdrl.turns.workers import Held, Reply, Workers


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The begin of a prompt's samples.

    Args:
        messages: messages of the prompt.
        tools: JSON schemas of the tools that the chat template is given; they may be none.
        entry: the row, for `EnvironmentTurns.open`: JSON, with a digest of the messages.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    entry: str


class EnvironmentTurns(AbstractContextManager["EnvironmentTurns"]):
    """A `TurnSource` that asks objects of a class. Not for use from two threads.

    Args:
        server: the rank's fork server.

    Raises:
        ValueError: the class cannot be loaded, or lacks a method.
    """

    def __init__(self, server: RewardServer, renderer: Renderer, settings: TurnsSettings) -> None:
        self._renderer, self._settings = renderer, settings
        self._workers = Workers(
            server,
            settings.work(),
            num_workers=settings.workers,
            timeout_s=settings.timeout_s,
        )
        self._counts: Mapping[str, int] = {}
        self._metrics: Mapping[str, float] = {}
        # only once: a file that changes during the run must not be taken for the one at its start
        self._described = f"{settings.kind} {dict(settings.options)} {source_digest(settings.kind)}"
        self._described += " rendered" if settings.renders_history else ""

    def describe(self) -> str:
        """Text that is equal for equal environments."""
        return self._described

    def openings(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Opening]:
        """Ask an object for the prompt of each row.

        Args:
            progress: callback with (rows done, rows in all), called at least once a second.

        Raises:
            ValueError: a row is no JSON, or `start` fails for it; the message shows the first one.
        """
        texts = [self._text(i, row) for i, row in enumerate(rows)]
        asked: dict[Held, int] = {}
        found: dict[int, Reply] = {}

        def ask(number: int) -> None:
            held = self._workers.make()
            asked[held] = number
            row = json.loads(texts[number])
            self._workers.ask(held, "start", "start", row=row, tools=True)
            self._workers.ask(held, "close", "close")

        for number in range(len(rows)):
            ask(number)
        while asked:
            if progress is not None:
                progress(len(found), len(rows))
            for reply in self._workers.poll(1.0):
                if reply.held not in asked:
                    continue
                if reply.tag == "start":
                    found[asked[reply.held]] = reply
                if reply.tag == "close" or reply.is_last:
                    number = asked.pop(reply.held)
                    self._workers.drop(reply.held)
                    if number not in found:
                        ask(number)
        for number in range(len(rows)):
            if found[number].reason:
                row = json.loads(texts[number])
                raise ValueError(start_failed(self._settings, row, found[number]))
        return [self._opening(text, found[i].value) for i, text in enumerate(texts)]

    @contextmanager
    def open(
        self,
        requests: Sequence[Request],
        entries: Sequence[str],
        states: Mapping[tuple[int, int], bytes] = MappingProxyType({}),
    ) -> Iterator[EnvironmentCall]:
        """See `TurnSource.open`. Objects are made as turns end, so on the leader alone; afterwards
        all have ended, with what they have started.

        Args:
            entries: `Opening.entry` of each request.
        """
        call = EnvironmentCall(
            self._workers, self._renderer, self._settings, requests, entries, states
        )
        try:
            yield call
        finally:
            call.close()
            self._counts, self._metrics = call.counts(), call.metrics()
            if self._workers.is_used:
                self._workers.renew()

    def counts(self) -> Mapping[str, int]:
        """Return counts of the last call: samples by the reason of their end (`Ending`), those that
        were `restarted`, and objects that were `remade`.
        """
        return self._counts

    def metrics(self) -> Mapping[str, float]:
        """Return sums of the observations' `metrics` over the turns that the last call answered on
        this rank.
        """
        return self._metrics

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _text(self, number: int, row: Mapping[str, Any]) -> str:
        try:
            return json.dumps(dict(row), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self._settings.key}: row {number} of the prompts, {reprlib.repr(row)}, cannot "
                f"be given to an environment, which gets JSON values: {error}"
            ) from None

    def _opening(self, row: str, value: Mapping[str, Any]) -> Opening:
        messages, tools = value["messages"], value["tools"]
        entry = {"row": json.loads(row), "opening": digest_of(messages)}
        if self._settings.renders_history:  # a conversation begins with them
            entry |= {"messages": messages, "tools": tools}
        return Opening(messages=messages, tools=tools, entry=json.dumps(entry))
