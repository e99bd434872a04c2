"""Conversations that are rendered (`rollout.turns.history: rendered`): a turn's context is what the
chat template writes, and where that is what was there the sample is that of `kept`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from toy_turns import Play

from chat_templates import FAMILIES, byte_tokenizer
from spmdrl.rewards.server import RewardServer, start_reward_server
from spmdrl.rollout.protocol import Request, SamplingParams, Turns
from spmdrl.rollout.turn_messages import answers_of, written
from spmdrl.run.turns import _Renderer
from spmdrl.turns.call import EnvironmentTurns
from spmdrl.turns.rendering import TurnRenderer
from spmdrl.turns.settings import TurnsSettings

PLACE = Path(__file__).parents[1] / "turn_environments.py"
ROWS = [{"question": f"What is {i}?"} for i in range(12)]


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with start_reward_server() as server:
        yield server


class Told:
    """The turns of a call, whose answers pass as a leader sends them."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.ended, self.states, self.heard = turns.ended, turns.states, turns.heard

    def answers(self, wait_s: float) -> Any:
        return list(answers_of(written(self._turns.answers(wait_s))))


class Model:
    """Tokenizer of a family, with turns drawn for it: some think, some are cut, some spell a word
    with other tokens than the tokenizer would.
    """

    def __init__(self, family: str) -> None:
        self.tokenizer = byte_tokenizer(FAMILIES[family], merges=("at",))
        self.renderer = TurnRenderer(self.tokenizer, datetime(2024, 2, 29))
        self.drawn: set[str] = set()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def draw(self, context: Sequence[int], limit: int) -> tuple[int, ...]:
        number = (sum(context) + len(context)) % 7
        name = ("thinks", "thinks", "thinks", "cut", "spells", "x", "x")[number]
        self.drawn.add(name)
        letters = self.ids("abcde"[: 1 + number % 5])
        if name == "thinks":
            letters = self.ids("<think>\nwhy\n</think>\n\n") + letters
        if name == "spells":
            letters = [*self.ids("a"), *self.ids("t"), *letters]
        return tuple(letters if name == "cut" else [*letters, *self.ids("<|im_end|>")])

    def source(self, server: RewardServer, kind: str, *, rendered: bool) -> EnvironmentTurns:
        settings = TurnsSettings(
            kind=f"{PLACE}:{kind}",
            max_turns=4,
            workers=2,
            timeout_s=20.0,
            renders_history=rendered,
        )
        return EnvironmentTurns(server, _Renderer(self.renderer), settings)

    def asked(self, source: EnvironmentTurns) -> tuple[list[Request], list[str]]:
        openings = source.openings(ROWS)
        requests = [
            Request(
                tokens=tuple(self.renderer.opening(opening.messages, opening.tools)),
                prompt_id=i,
                samples=(0,),
                sampling=SamplingParams(max_tokens=40),
                room=4000,
            )
            for i, opening in enumerate(openings)
        ]
        return requests, [opening.entry for opening in openings]


def played(
    model: Model,
    server: RewardServer,
    kind: str = "Counting",
    check: Callable[[Play, Any, tuple[int, int]], None] | None = None,
    *,
    rendered: bool = True,
) -> Play:
    with model.source(server, kind, rendered=rendered) as source:
        requests, entries = model.asked(source)
        with source.open(requests, entries) as turns:
            told = Told(turns)
            game = Play(requests, told, model.draw).run()
            for where in game.tokens:
                if check is not None:
                    check(game, told, where)
    return game


def messages_of(game: Play, told: Any, where: tuple[int, int], model: Model) -> list[Any]:
    """The conversation before each turn but the first, from what was drawn and said."""
    row = ROWS[where[0]]
    talk = [{"role": "user", "content": f"Count: {row['question'][:12]}"}]
    heard, found, start = told.heard().get(where, {}), [], 0
    for number, (first, last) in enumerate(game.given[where]):
        drawn = model.renderer.text(game.tokens[where][start:first], special=False)
        talk = [*talk, {"role": "assistant", "content": drawn}, *json.loads(heard[number])]
        found.append(talk)
        start = last
    return found


def test_each_context_is_the_conversation_as_the_template_renders_it(server: RewardServer) -> None:
    model, counts = Model("thinking"), {"parts": 0, "turns": 0}

    def check(game: Play, told: Any, where: tuple[int, int]) -> None:
        tokens, parts = game.tokens[where], game.parts[where]
        for (first, last), talk in zip(
            game.given[where], messages_of(game, told, where, model), strict=True
        ):
            begins = [0, *(part for part in parts if part <= first)][-1]
            prompt = () if parts and first >= parts[0] else game.requests[where[0]].tokens
            context = [*prompt, *tokens[begins:last]]
            said = model.tokenizer.decode(context, skip_special_tokens=False)
            assert said == model.tokenizer.apply_chat_template(
                talk, tokenize=False, add_generation_prompt=True
            )
            # a user's text ends no turn
            end = model.ids("<|im_end|>")[0]
            assert context.count(end) == len(talk) and said.count("<|im_end|>") > len(talk)
            if first in parts:
                assert list(tokens[first:last]) == model.renderer.opening(talk)
            counts["parts"] += first in parts
            counts["turns"] += 1

    game = played(model, server, check=check)
    assert 0 < counts["parts"] < counts["turns"] and counts["turns"] > 6
    assert model.drawn == {"thinks", "cut", "spells", "x"}
    kept = played(model, server, rendered=False)
    assert not any(kept.parts.values()) and kept.result() != game.result()


def test_a_template_that_rewrites_nothing_gives_what_kept_gives(server: RewardServer) -> None:
    for family in ("chatml", "hermes"):
        model = Model(family)
        game = played(model, server)
        assert game.result() == played(model, server, rendered=False).result()
        assert not any(game.parts.values()) and any(game.given.values())
        assert {"cut", "spells"} <= model.drawn


@pytest.mark.parametrize("kind", ["Counting", "Saving"])
def test_a_stopped_call_resumes_in_its_part(kind: str, server: RewardServer) -> None:
    model = Model("thinking")
    wanted = played(model, server, kind)
    with model.source(server, kind, rendered=True) as source:
        requests, entries = model.asked(source)
        for most in (5, 9):
            with source.open(requests, entries) as turns:
                part = Play(requests, turns, model.draw).run(most)
                states = turns.states()
            assert any(part.parts[where] for where in part.waits)
            assert bool(states) == (kind == "Saving")
            with source.open(part.begun(), entries, states) as turns:
                rest = Play(part.begun(), turns, model.draw).run()
            assert {**part.result(), **rest.result()} == wanted.result()
            assert {**part.parts, **rest.parts} == wanted.parts
            assert source.counts()["restarted"] == 0


def test_what_a_stopped_call_has_kept_must_be_of_the_same_history(server: RewardServer) -> None:
    """A context that the template would not write starts again."""
    model = Model("thinking")
    with model.source(server, "Counting", rendered=False) as source:
        kept_entries = model.asked(source)[1]
        described = source.describe()
    with model.source(server, "Counting", rendered=True) as source:
        requests, entries = model.asked(source)
        assert kept_entries != entries and source.describe() == f"{described} rendered"
        with source.open(requests, entries) as turns:
            part = Play(requests, turns, model.draw).run(9)
        begun = [
            replace(request, begun=tuple(replace(c, parts=()) for c in request.begun))
            for request in part.begun()
        ]
        with source.open(begun, entries) as turns:
            rest = Play(begun, turns, model.draw).run()
        assert source.counts()["restarted"] == len(rest.restarted) > 0
        assert rest.result().items() <= played(model, server).result().items()


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_rendered_from_their_text_or_refused(family: str) -> None:
    renderer = Model(family).renderer
    if family in ("chatml", "hermes", "thinking", "headers", "roles"):
        renderer.check_calls("history=rendered")
        return
    with pytest.raises(ValueError, match=r"^history=rendered: .* set it to kept"):
        renderer.check_calls("history=rendered")
