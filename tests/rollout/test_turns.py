"""Samples that take turns: the tokens are those of the turns asked one by one, whenever the answers
arrive, however little room there is, and after a stop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rollout_models import assert_same, make_engine, prompts_of, request, tiny_model
from test_aborted import begun
from test_engine import CACHE_BLOCK
from test_engine_moe import engine_of as moe_engine
from test_engine_recurrent import model as recurrent_model

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import Answer, Completion, Ending, Finish, Request, Turn
from spmdrl.testing.engine_subject import stop_after
from spmdrl.world import World

ROUNDS = 4


def answer_to(turn: Turn) -> Answer:
    """An answer that depends on what was drawn: other tokens, and another limit, for each turn."""
    where: dict[str, Any] = {"request": turn.request, "sample": turn.sample}
    where["reward"] = turn.number - sum(turn.tokens) / 3
    total = sum(turn.tokens) + 7 * turn.number + turn.finish
    if turn.number == ROUNDS - 1 or total % 11 == 0:
        return Answer(**where, ending=Ending.ROOM if total % 2 else Ending.DONE)
    given = tuple((total + 13 * k) % 100 + 6 for k in range(1 + total % 12))
    return Answer(**where, tokens=given, max_tokens=1 + total % 9)


class Scripted:
    """Answers that arrive after some engine steps.

    Args:
        delay: number of steps of a turn's answer.
    """

    def __init__(self, delay: Callable[[Turn], int] = lambda turn: 0) -> None:
        self._delay, self.told = delay, 0
        self._open: list[tuple[int, Answer]] = []

    def ended(self, turn: Turn) -> None:
        self.told += 1
        self._open.append((self._delay(turn), answer_to(turn)))

    def answers(self, wait_s: float) -> Sequence[Answer]:
        least = min((left for left, _ in self._open), default=0) if wait_s else 0
        here = [answer for left, answer in self._open if left <= least]
        self._open = [(left - 1 - least, a) for left, a in self._open if left > least]
        return here


def requests(**sampling: Any) -> list[Request]:
    asked = [
        request(tokens, 40 + i, samples, max_tokens=6 + i, margins=True, **sampling)
        for i, (tokens, samples) in enumerate(
            zip(prompts_of(9, 33, 16, 1, 21), (3, 1, 4, 1, 2), strict=True)
        )
    ]
    return [replace(a, room=ROUNDS * (a.sampling.max_tokens + 24)) for a in asked]


def generate(engine: NativeEngine, asked: list[Request], **more: Any) -> list[list[Completion]]:
    return engine.generate(asked, seed=11, step=2, **more)


def one_by_one(make: Callable[..., NativeEngine], asked: list[Request]) -> list[list[Completion]]:
    """Every turn as a request of its own, whose prompt is all that was there before."""
    engine = make()
    found = []
    for i, own in enumerate(asked):
        found.append([_turns_of(engine, own, i, sample) for sample in own.samples])
    return found


def _turns_of(
    engine: NativeEngine,
    own: Request,
    place: int,
    sample: int,
    change: Callable[[Answer], Answer] = lambda answer: answer,
) -> Completion:
    whole: Completion | None = None
    context, limit = own.tokens, own.sampling.max_tokens
    for number in range(ROUNDS):
        sampling = own.sampling.model_copy(update={"max_tokens": limit})
        ask = replace(own, tokens=context, samples=(sample,), sampling=sampling, room=0)
        [[drawn]] = generate(engine, [ask])
        whole = drawn if whole is None else _joined(whole, drawn)
        turn = Turn(
            request=place, sample=sample, number=number, tokens=drawn.tokens, finish=drawn.finish
        )
        answer = change(answer_to(turn))
        whole = replace(whole, rewards=(*whole.rewards, answer.reward))
        if answer.max_tokens == 0:
            return replace(whole, finish=answer.ending.finish, ending=answer.ending)
        given = Completion(
            tokens=answer.tokens,
            logprobs=(0.0,) * len(answer.tokens),
            finish=Finish.ABORTED,
            margins=(0.0,) * len(answer.tokens),
        )
        first = len(whole.tokens)
        whole = replace(
            _joined(whole, given), given=(*whole.given, (first, first + len(answer.tokens)))
        )
        whole = replace(whole, parts=(*whole.parts, *[first] * answer.begins_part))
        begins = whole.parts[-1] if whole.parts else 0
        prompt, limit = () if whole.parts else own.tokens, answer.max_tokens
        context = (*prompt, *whole.tokens[begins:])
    raise AssertionError("an answer ends the last round")


def _joined(one: Completion, other: Completion) -> Completion:
    return replace(
        one,
        tokens=(*one.tokens, *other.tokens),
        logprobs=(*one.logprobs, *other.logprobs),
        margins=(*one.margins, *other.margins),
        experts=one.experts if other.experts is None else other.experts,
    )


def same(found: list[list[Completion]], wanted: list[list[Completion]], what: str) -> None:
    for i, (group, want) in enumerate(zip(found, wanted, strict=True)):
        for sample, (own, other) in enumerate(zip(group, want, strict=True)):
            where = f"{what}, prompt {i}, sample {sample}"
            assert (own.tokens, own.given, own.finish, own.ending) == (
                other.tokens,
                other.given,
                other.finish,
                other.ending,
            ), where
            assert own.waits is None
            assert own.rewards == other.rewards, where
            assert len(own.rewards) == len(own.given) + 1
            drawn = [not any(a <= n < b for a, b in own.given) for n in range(len(own.tokens))]
            assert all(own.logprobs[n] == 0 for n, is_own in enumerate(drawn) if not is_own)
            assert_same(own, other, where)


def make(**options: Any) -> NativeEngine:
    return make_engine(*tiny_model(), **options)


@pytest.fixture(scope="module")
def expected() -> list[list[Completion]]:
    return one_by_one(make, requests())


DELAYS: dict[str, Callable[[Turn], int]] = {
    "at once": lambda turn: 0,
    "late": lambda turn: 3 + turn.number,
    "in disorder": lambda turn: (5 * turn.request + 3 * turn.sample + 7 * turn.number) % 11,
    "one never in time": lambda turn: 400 if turn.request == 1 else 0,
}

SCHEDULES: list[dict[str, Any]] = [
    {},
    {"block_size": 1},
    {"block_size": 32},
    {"prefill_tokens": 5},
    {"max_running": 1},
    {"max_running": 3, "prefill_tokens": 16},
    {"kv_cache_gb": 20 * CACHE_BLOCK / 1e9},
    {"kv_cache_gb": 20 * CACHE_BLOCK / 1e9, "prefill_tokens": 5, "max_running": 4},
]


@pytest.mark.parametrize(
    ("options", "delay"),
    [
        pytest.param(options, delay, marks=() if (i + j) % 4 == 2 else pytest.mark.full)
        for i, options in enumerate(SCHEDULES)
        for j, delay in enumerate(DELAYS)
    ],
    ids=str,
)
def test_tokens_are_those_of_the_turns_one_by_one(
    options: dict[str, Any], delay: str, expected: list[list[Completion]]
) -> None:
    engine = make(**options)
    found = generate(engine, requests(), turns=Scripted(DELAYS[delay]))
    same(found, expected, f"{options}, {delay}")
    assert any(len(c.given) > 1 for group in found for c in group)


def test_a_parked_sample_gives_up_its_blocks_under_pressure(
    expected: list[list[Completion]],
) -> None:
    engine = make(kv_cache_gb=20 * CACHE_BLOCK / 1e9)
    same(generate(engine, requests(), turns=Scripted(lambda turn: 30)), expected, "pressure")
    assert engine.num_preempted > 0


@pytest.mark.parametrize("keeps", [True, False], ids=["with its state", "by what was drawn"])
def test_a_stopped_call_goes_on(keeps: bool, expected: list[list[Completion]]) -> None:
    for count in (1, 3, 6, 11, 17, 26):
        first = make(keeps_aborted=True)
        delays = DELAYS["in disorder"]
        part = generate(first, requests(), turns=Scripted(delays), should_stop=stop_after(count))
        state = first.aborted_state() if keeps else {}
        assert any(c.finish is Finish.ABORTED for group in part for c in group)
        asked = requests() if keeps else begun(requests(), part)
        answers = Scripted(delays)
        found = generate(make(max_running=7), asked, turns=answers, state=state)
        same(found, expected, f"stopped at {count}")


def test_a_stop_while_all_wait_is_seen(expected: list[list[Completion]]) -> None:
    class Silent(Scripted):
        def answers(self, wait_s: float) -> Sequence[Answer]:
            return ()

    engine = make(keeps_aborted=True)
    part = generate(engine, requests(), turns=Silent(), should_stop=stop_after(60))
    flat = [c for group in part for c in group]
    assert all(c.finish is Finish.ABORTED and c.waits is not None for c in flat)
    answers = Scripted()
    found = generate(make(), begun(requests(), part), turns=answers)
    same(found, expected, "all waited")


class Restarting(Scripted):
    """Answers where some samples start again once, at different turns."""

    def __init__(self, delay: Callable[[Turn], int]) -> None:
        super().__init__(delay)
        self.restarted: set[tuple[int, int]] = set()

    def answers(self, wait_s: float) -> Sequence[Answer]:
        found = []
        for answer in super().answers(wait_s):
            key = (answer.request, answer.sample)
            if (answer.request + answer.sample) % 2 or key in self.restarted:
                found.append(answer)
                continue
            self.restarted.add(key)
            found.append(Answer(request=answer.request, sample=answer.sample, restarts=True))
        return found


@pytest.mark.parametrize(
    "options", [{}, {"max_running": 3}, {"kv_cache_gb": 20 * CACHE_BLOCK / 1e9}], ids=str
)
def test_a_sample_that_starts_again_draws_the_same(
    options: dict[str, Any], expected: list[list[Completion]]
) -> None:
    turns = Restarting(DELAYS["in disorder"])
    same(generate(make(**options), requests(), turns=turns), expected, "restarted")
    assert len(turns.restarted) == 5


def test_random_arrivals_change_nothing(expected: list[list[Completion]]) -> None:
    draw = random.Random(5)
    for number in range(4):
        options = {
            "block_size": draw.choice([1, 4, 8, 16]),
            "max_running": draw.randint(1, 12),
            "prefill_tokens": draw.randint(3, 64),
        }
        most = draw.randint(0, 40)
        delay = {key: draw.randint(0, most) for key in range(1000)}
        turns = Scripted(lambda t, d=delay: d[100 * t.request + 10 * t.sample + t.number])  # type: ignore[misc]
        same(generate(make(**options), requests(), turns=turns), expected, f"{number}: {options}")


@pytest.mark.full
def test_what_starts_again_has_other_states_and_choices_of_experts() -> None:
    def recurrent(**options: Any) -> NativeEngine:
        return make_engine(*recurrent_model(), **options)

    def moe(**options: Any) -> NativeEngine:
        return moe_engine("Mixtral", **options)

    for engine, asked in ((recurrent, requests()), (moe, requests(experts=True))):
        turns = Restarting(DELAYS["late"])
        found = generate(engine(max_running=5), asked, turns=turns)
        same(found, one_by_one(engine, asked), engine.__name__)
        assert turns.restarted


@pytest.mark.full
def test_recurrent_states_go_on_over_turns() -> None:
    """Slots are as few as the engine has: those of parked samples are taken."""
    asked = requests()

    def recurrent(**options: Any) -> NativeEngine:
        return make_engine(*recurrent_model(), **options)

    wanted = one_by_one(recurrent, asked)
    cases = (({}, "late"), ({"max_running": 2}, "in disorder"), ({"prefill_tokens": 5}, "late"))
    for options, name in cases:
        found = generate(recurrent(**options), asked, turns=Scripted(DELAYS[name]))
        same(found, wanted, f"{options}, {name}")


@pytest.mark.full
def test_experts_of_all_turns_are_recorded() -> None:
    asked = requests(experts=True)

    def moe(**options: Any) -> NativeEngine:
        return moe_engine("Mixtral", **options)

    wanted = one_by_one(moe, asked)
    pressed = {"kv_cache_gb": 32 * CACHE_BLOCK / 1e9}
    for options in ({}, pressed, {"prefill_tokens": 5}):
        found = generate(moe(**options), asked, turns=Scripted(DELAYS["in disorder"]))
        same(found, wanted, str(options))
        for i, group in enumerate(found):
            for own, other in zip(group, wanted[i], strict=True):
                assert own.experts is not None and other.experts is not None
                assert len(own.experts) == len(asked[i].tokens) + len(own.tokens)
                assert torch.equal(own.experts, other.experts)


class Nobody(Scripted):
    """Turns on a rank that does not lead."""

    def ended(self, turn: Turn) -> None:
        raise AssertionError("only the leader is told")

    answers = ended  # type: ignore[assignment]


def on_ranks(world: World) -> list[list[Completion]]:
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    engine = make_engine(*tiny_model(), tp=tp, max_running=7)
    turns = Scripted(DELAYS["in disorder"]) if world.is_first else Nobody()
    return generate(engine, requests(), turns=turns)


def test_ranks_in_lockstep_get_the_leaders_answers(expected: list[list[Completion]]) -> None:
    for found in run_ranks(on_ranks, 2):
        same(found, expected, "tp 2")
