"""Turns by rounds, with an engine that draws them one by one and one that stands in for vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rollout_models import make_engine, tiny_model
from test_turns import DELAYS, Nobody, Restarting, Scripted, answer_to, make, requests

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import Answer, Completion, Finish, Progress, Request, Turn
from spmdrl.rollout.rounds import by_rounds
from spmdrl.world import World

ALONE = Lockstep(Parallel(), torch.device("cpu"))


class Drawing:
    """A native engine whose calls take no turns; each answers for one turn, as vLLM's do."""

    def __init__(self, engine: NativeEngine, stops: Callable[[], bool] | None = None) -> None:
        self._engine, self._stops = engine, stops
        self.calls: list[list[tuple[int, int]]] = []

    def __call__(
        self, asked: Sequence[Request], numbers: Sequence[int], progress: Progress
    ) -> list[list[Completion]]:
        assert all(request.room == 0 and not request.begun for request in asked)
        self.calls.append(
            [(r.prompt_id, n) for r, n in zip(asked, numbers, strict=True) for _ in r.samples]
        )
        return self._engine.generate(
            asked, seed=11, step=2, progress=progress, should_stop=self._stops
        )


def wanted() -> list[list[Completion]]:
    return make().generate(requests(), seed=11, step=2, turns=Scripted())


@pytest.fixture(scope="module")
def expected() -> list[list[Completion]]:
    return wanted()


def same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    """An engine whose random numbers depend on the place in the context draws the same."""
    for group, others in zip(found, expected, strict=True):
        for own, other in zip(group, others, strict=True):
            assert own.tokens == other.tokens and own.given == other.given
            assert (own.finish, own.ending, own.rewards) == (
                other.finish,
                other.ending,
                other.rewards,
            )
            assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert len(own.margins) == len(own.tokens) and own.waits is None
            assert own.turn_limit is None


@pytest.mark.parametrize("delay", DELAYS)
def test_rounds_join_the_turns(delay: str, expected: list[list[Completion]]) -> None:
    draw, told = Drawing(make()), []
    found = by_rounds(
        draw,
        requests(),
        Scripted(DELAYS[delay]),
        ALONE,
        progress=lambda tokens, done: told.append((tokens, done)),
    )
    same(found, expected)
    samples = sum(len(request.samples) for request in requests())
    assert sorted(draw.calls[0]) == sorted((r.prompt_id, 0) for r in requests() for _ in r.samples)
    assert [numbers for call in draw.calls for _, numbers in call] == [
        number for number, call in enumerate(draw.calls) for _ in call
    ]  # a barrier after each turn
    drawn = sum(len(c.tokens) - sum(b - a for a, b in c.given) for g in found for c in g)
    assert told[-1] == (drawn, samples)


def test_what_starts_again_is_drawn_again(expected: list[list[Completion]]) -> None:
    turns = Restarting(DELAYS["late"])
    same(by_rounds(Drawing(make()), requests(), turns, ALONE), expected)
    assert turns.restarted


def test_support_has_no_rows_for_what_was_given() -> None:
    asked = requests(support=True, top_k=3, temperature=1.5)
    expected = make().generate(asked, seed=11, step=2, turns=Scripted())
    found = by_rounds(Drawing(make()), asked, Scripted(), ALONE)
    same(found, expected)
    for group, others in zip(found, expected, strict=True):
        for own, other in zip(group, others, strict=True):
            assert own.support is not None and other.support is not None
            assert own.support.counts.tolist() == other.support.counts.tolist()
            assert own.support.values.tolist() == other.support.values.tolist()


@pytest.mark.parametrize("count", [1, 5, 9, 14])
def test_a_stopped_call_goes_on(count: int, expected: list[list[Completion]]) -> None:
    """Stopped while it draws: finished turns are kept, others are drawn again."""
    steps = iter(range(1000))

    def stops() -> bool:
        return next(steps) >= count

    part = by_rounds(Drawing(make(), stops), requests(), Scripted(), ALONE, should_stop=stops)
    flat = [c for group in part for c in group]
    assert any(c.finish is Finish.ABORTED for c in flat)
    for c in flat:
        end = c.given[-1][1] if c.given else 0
        assert c.finish is not Finish.ABORTED or c.waits is not None or len(c.tokens) == end
    asked = [
        replace(request, begun=tuple(group))
        for request, group in zip(requests(), part, strict=True)
    ]
    same(by_rounds(Drawing(make()), asked, Scripted(), ALONE), expected)


def test_a_stop_while_all_wait_is_seen(expected: list[list[Completion]]) -> None:
    class Never(Scripted):
        def answers(self, wait_s: float) -> Sequence[Answer]:
            return ()

    looks = iter(range(1000))
    part = by_rounds(
        Drawing(make()), requests(), Never(), ALONE, should_stop=lambda: next(looks) > 2
    )
    assert all(c.waits is not None for group in part for c in group)
    asked = [replace(r, begun=tuple(group)) for r, group in zip(requests(), part, strict=True)]
    draw, turns = Drawing(make()), Scripted()
    same(by_rounds(draw, asked, turns, ALONE), expected)
    assert all(number > 0 for call in draw.calls for _, number in call)


def on_ranks(world: World) -> list[list[Completion]]:
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    draw = Drawing(make_engine(*tiny_model(), tp=tp, max_running=7))
    turns: Any = Scripted(DELAYS["in disorder"]) if world.is_first else Nobody()
    return by_rounds(draw, requests(), turns, Lockstep(tp, torch.device("cpu")))


def test_ranks_in_lockstep_get_the_leaders_answers(expected: list[list[Completion]]) -> None:
    for found in run_ranks(on_ranks, 2):
        same(found, expected)


def test_an_answer_without_room_is_refused() -> None:
    class TooLong(Scripted):
        def ended(self, turn: Turn) -> None:
            answer = answer_to(turn)
            if answer.max_tokens:
                answer = replace(answer, tokens=(7,) * 400)
            self._open.append((0, answer))

    with pytest.raises(AssertionError):
        by_rounds(Drawing(make()), requests(), TooLong(), ALONE)
