"""The engine's loop equals the plainest one bit for bit on random workloads: tokens,
log-probabilities, margins, supports, experts, reasons, counters and the states of stopped calls;
with forks, preemption, stops, turns, adapters, recurrent states and ranks in lockstep.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from adapted_models import adapted_engine, add_filled, uneven, values_of
from plain_loop import make_plain
from rollout_models import EOS, make_engine, prompts_of, request, tiny_model
from test_engine import CACHE_BLOCK
from test_engine_moe import engine_of as moe_engine
from test_engine_parts import Parted
from test_engine_recurrent import model as recurrent_model
from test_turns import ROUNDS, Scripted

from agreement import assert_same
from harness import run_ranks
from spmdrl.batch import Ragged
from spmdrl.distributed.parallel import Parallel
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.loop import StepLoop
from spmdrl.rollout.native.sampler import Sampler
from spmdrl.rollout.protocol import OWN, Completion, Request, Turn
from spmdrl.testing.engine_subject import stop_after
from spmdrl.world import World
from sweeps import swept

ADAPTERS = (OWN, "other", None)


@cache
def adapted() -> tuple[Any, ...]:
    model, source = tiny_model()
    return model, source, uneven(model)


def with_adapters(**options: Any) -> NativeEngine:
    model, source, adapter = adapted()
    engine = adapted_engine(model, source, adapter, values_of(model, adapter), **options)
    add_filled(engine, "other", adapter, values_of(model, adapter, seed=6))
    return engine


MODELS: dict[str, Callable[..., NativeEngine]] = {
    "dense": lambda **options: make_engine(*tiny_model(), **options),
    "experts": lambda **options: moe_engine("Qwen3Moe", **options),
    "recurrent": lambda **options: make_engine(*recurrent_model(), **options),
    "adapters": with_adapters,
}
TEXTS = ("dense", "recurrent")
"""Models whose engines can spell."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A call.

    Args:
        stops: numbers of steps after which it is stopped, and continued with the engine's state
            (or, where a number is negative, with what its samples had drawn).
        delay: steps until a turn is answered; None: no turns.
        parts: whether some answers begin a part.
    """

    model: str
    options: dict[str, Any]
    requests: list[Request]
    stops: tuple[int, ...]
    delay: int | None
    parts: bool


def workload(seed: int) -> Workload:
    draw = random.Random(seed)
    model = draw.choice(("dense", "dense", "dense", *MODELS))
    turns = draw.random() < 0.25
    pressed = model == "dense" and draw.random() < 0.5
    options: dict[str, Any] = {
        "block_size": draw.choice((4, 8, 8, 16)) if not pressed else 8,
        "max_running": draw.choice((1, 2, 3, 5, 9, 256)),
        "prefill_tokens": draw.choice((3, 7, 24, 2048)),
        "keeps_aborted": True,
    }
    if pressed:
        options["kv_cache_gb"] = draw.choice((20, 24, 30)) * CACHE_BLOCK / 1e9
    count = draw.choice((1, 2, 4, 7))
    prompts = prompts_of(*(draw.choice((1, 5, 8, 9, 16, 20)) for _ in range(count)))
    if draw.random() < 0.3 and not turns:
        common = prompts_of(140)[0][: 140 if not pressed else 8]
        prompts = [(*common, *prompt) for prompt in prompts]
    asked = []
    for i, prompt in enumerate(prompts):
        lengths = (1, 3, 6, 10) if turns else (1, 3, 12, 30)
        one = request(prompt, 40 + i, draw.choice((1, 1, 2, 4)), **sampling(draw, model, lengths))
        if turns:
            one = replace(one, room=ROUNDS * (one.sampling.max_tokens + 24))
        if model == "adapters":
            one = replace(one, adapter=draw.choice(ADAPTERS))
        asked.append(one)
    stops = tuple(draw.choice((1, 4, 9, -6, 17)) for _ in range(draw.choice((0, 0, 1, 3))))
    return Workload(
        model=model,
        options=options,
        requests=asked,
        stops=stops if not turns else (),
        delay=draw.choice((0, 3, 9)) if turns else None,
        parts=turns and model != "experts" and draw.random() < 0.5,
    )


def sampling(draw: random.Random, model: str, lengths: Sequence[int]) -> dict[str, Any]:
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8, "support": True},
        {"min_p": 0.1, "temperature": 1.3},
    )
    found = {**draw.choice(kinds), "max_tokens": draw.choice(lengths)}
    found |= {"margins": draw.random() < 0.5, "ignore_eos": draw.random() < 0.5}
    if draw.random() < 0.3:
        found["stop_token_ids"] = (draw.randint(6, 120), EOS)
    if model in TEXTS and draw.random() < 0.4:
        found["stop"] = (str(draw.randint(10, 99)), f"{draw.randint(0, 9)}0{draw.randint(0, 9)}")
    if model == "experts":
        found["experts"] = draw.random() < 0.7
    return found


def delay_of(factor: int, turn: Turn) -> int:
    return (factor * turn.sample + turn.number) % 11


def note(done: list[tuple[int, ...]], *counts: int) -> None:
    done.append(counts)


def run(work: Workload, tp: Parallel | None = None) -> list[Any]:
    """All that a call gives, and what it counts, in every part of it."""
    seen: list[Any] = []
    state: dict[str, Any] = {}
    asked = work.requests
    for stop in (*work.stops, None):
        words = {} if tp is None else {"tp": tp}
        engine = MODELS[work.model](**work.options, **words)
        turns: dict[str, Any] = {}
        if work.delay is not None:
            answers = Parted if work.parts else Scripted
            turns["turns"] = answers(partial(delay_of, work.delay))
        done: list[tuple[int, ...]] = []
        found = engine.generate(
            asked,
            seed=3,
            step=1,
            state=state,
            should_stop=None if stop is None else stop_after(abs(stop)),
            progress=partial(note, done),
            **turns,
        )
        state = engine.aborted_state()
        seen += [found, done, engine.num_preempted, state]
        if stop is not None and stop < 0:
            asked = [replace(a, begun=tuple(g)) for a, g in zip(asked, found, strict=True)]
            state = {}
    return seen


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Completion):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, Ragged):
        return same([one.counts, one.values], [other.counts, other.values])
    return bool(one == other)


BRIEF = (1, 19, 21, 26, 47, 53, 54, 56)


@pytest.mark.parametrize("seed", swept(range(200), BRIEF))
def test_a_random_workload_is_served_as_by_the_plainest_loop(seed: int) -> None:
    work = workload(seed)
    found = run(work)
    with pytest.MonkeyPatch.context() as patch:
        make_plain(patch)
        expected = run(work)
    assert same(found, expected), work


def test_the_random_workloads_have_everything() -> None:
    """Some that run in every suite are preempted, stopped, and take turns."""
    works = [workload(seed) for seed in BRIEF]
    assert {work.model for work in works} == set(MODELS)
    assert any(work.stops for work in works)
    assert any(work.delay is not None for work in works)
    assert any(work.parts for work in works)
    assert any(r.sampling.stop for work in works for r in work.requests)
    assert any(r.sampling.experts for work in works for r in work.requests)
    assert any(
        len(r.samples) > work.options["max_running"] for work in works for r in work.requests
    )
    assert any(run(work)[2] for work in works if "kv_cache_gb" in work.options)


def on_ranks(world: World, seeds: Sequence[int]) -> list[bool]:
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    equal = []
    for seed in seeds:
        work = workload(seed)
        found = run(work, tp)
        with pytest.MonkeyPatch.context() as patch:
            make_plain(patch)
            equal.append(same(found, run(work, tp)))
    return equal


DENSE = [s for s in range(60) if workload(s).model == "dense" and workload(s).delay is None]


@pytest.mark.parametrize("seeds", [(21,), pytest.param(tuple(DENSE), marks=pytest.mark.full)])
def test_ranks_in_lockstep_are(seeds: tuple[int, ...]) -> None:
    assert run_ranks(on_ranks, 2, seeds) == [[True] * len(seeds)] * 2


def same_tokens(found: list[Any], expected: list[Any], what: str) -> None:
    """The completions of two lists of `run` are the same up to rounding."""
    for one, other in zip(found[-4], expected[-4], strict=True):
        for own, want in zip(one, other, strict=True):
            assert_same(own, want, what)
            assert (own.given, own.waits, own.ending) == (want.given, want.waits, want.ending)
            drawn = len(own.tokens)
            assert len(own.logprobs) == drawn and len(own.margins) in (0, drawn)
            if own.support is not None:
                assert len(own.support.counts) == drawn


@pytest.mark.parametrize("seed", swept(range(60), BRIEF))
def test_a_loop_that_runs_ahead_draws_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads results a step later, as on a device that computes by itself."""
    work = workload(seed)
    margins = [
        replace(one, sampling=one.sampling.model_copy(update={"margins": True}))
        for one in work.requests
    ]
    work = replace(work, requests=margins)
    expected = run(work)
    open_steps: list[int] = []
    launch, digest = StepLoop._launch, StepLoop._digest
    count = [0, 0]  # steps launched, tokens in vain

    def counted_launch(loop: StepLoop, *arguments: Any) -> Any:
        count[0] += 1
        open_steps.append(count[0])
        assert len(open_steps) <= 2
        return launch(loop, *arguments)

    def counted_digest(loop: StepLoop, step: Any) -> bool:
        open_steps.pop(0)
        count[1] += sum(sample in step.plan.decodes for sample in loop._ended)
        return digest(loop, step)

    monkeypatch.setattr(StepLoop, "_launch", counted_launch)
    monkeypatch.setattr(StepLoop, "_digest", counted_digest)
    ran = StepLoop.__init__
    monkeypatch.setattr(
        StepLoop, "__init__", lambda loop, **parts: ran(loop, **{**parts, "runs_ahead": True})
    )
    found = run(work)
    same_tokens(found, expected, f"workload {seed}")
    last = found[-4]
    turns = sum(len(c.given) + 1 for group in last for c in group)
    assert count[1] <= turns * (len(work.stops) + 1), "one token in vain for each end of a turn"
    if not work.stops:
        assert found[-3][-1] == expected[-3][-1], "tokens in vain are not counted"


def drawing_otherwise(world: World) -> None:
    """The second rank's device draws another token than the first's."""
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=world.size)
    draw = Sampler.draw

    def other(sampler: Sampler, *arguments: Any) -> Any:
        found = draw(sampler, *arguments)
        return replace(found, tokens=(found.tokens + world.rank) % 100)

    Sampler.draw = other  # type: ignore[method-assign]
    asked = [request(prompts_of(9)[0], 1, max_tokens=20, ignore_eos=True)]
    make_engine(*tiny_model(), tp=tp).generate(asked, seed=0, step=0)


def test_ranks_that_draw_other_tokens_are_named() -> None:
    with pytest.raises(AssertionError, match="have drawn other tokens"):
        run_ranks(drawing_otherwise, 2)
