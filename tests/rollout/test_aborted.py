"""An aborted call goes on: bit for bit with the engine's state, else by what was drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rollout_models import assert_same, make_engine, prompts_of, request, tiny_model
from test_engine import CACHE_BLOCK, load

from spmdrl.memory.json_tensors import tensor_json
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import Completion, Finish, Request
from spmdrl.testing.engine_subject import stop_after
from sweeps import swept


def shared() -> list[Request]:
    """Requests with a long common beginning, which is computed once and shared."""
    (common, *ends) = prompts_of(150, 3, 9, 21, 4)
    return [
        request((*common, *end), i, 2, max_tokens=30, ignore_eos=True, margins=True)
        for i, end in enumerate(ends)
    ]


CASES: dict[str, tuple[Callable[[], list[Request]], dict[str, Any]]] = {
    "default": (load, {}),
    "chunks": (load, {"prefill_tokens": 7}),
    "few": (load, {"max_running": 3, "prefill_tokens": 16}),
    "preempted": (load, {"kv_cache_gb": 15 * CACHE_BLOCK / 1e9, "prefill_tokens": 5}),
    "shared": (shared, {"prefill_tokens": 40}),
}


def engine_of(options: dict[str, Any]) -> NativeEngine:
    return make_engine(*tiny_model(), keeps_aborted=True, **options)


def generate(engine: NativeEngine, asked: list[Request], **more: Any) -> list[list[Completion]]:
    return engine.generate(asked, seed=11, step=2, **more)


@pytest.mark.parametrize("name", swept(CASES, ["default", "chunks"]))
def test_it_goes_on_bit_for_bit_wherever_it_was_aborted(name: str) -> None:
    make, options = CASES[name]
    steps: list[int] = []
    engine = engine_of(options)
    expected = generate(engine, make(), should_stop=lambda: bool(steps.append(0)))
    assert engine.aborted_state() == {}
    for count in sorted({1, 5, len(steps) // 3, len(steps) - 1}):
        engine = engine_of(options)
        first = generate(engine, make(), should_stop=stop_after(count))
        state = engine.aborted_state()
        assert state and engine.aborted_state() == {}
        assert any(c.finish == Finish.ABORTED for group in first for c in group)
        other = engine_of(options)
        generate(other, make()[:2])  # whatever its cache held before
        assert generate(other, make(), state=state) == expected, count


def test_it_may_be_aborted_again_and_again() -> None:
    make, options = CASES["preempted"]
    expected = generate(engine_of(options), make())
    state: dict[str, Any] = {}
    for count in (4, 9, 2, 30, 11):
        engine = engine_of(options)
        found = generate(engine, make(), should_stop=stop_after(count), state=state)
        state = engine.aborted_state()
    assert any(c.finish == Finish.ABORTED for group in found for c in group)
    assert generate(engine_of(options), make(), state=state) == expected


def begun(asked: list[Request], found: list[list[Completion]]) -> list[Request]:
    return [replace(a, begun=tuple(group)) for a, group in zip(asked, found, strict=True)]


@pytest.mark.parametrize("name", swept(CASES, ["preempted"]))
def test_without_its_state_it_keeps_what_was_drawn(name: str) -> None:
    make, options = CASES[name]
    expected = generate(engine_of(options), make())
    for count in (1, 12, 31):
        first = generate(engine_of(options), make(), should_stop=stop_after(count))
        # as far as it came, another engine draws the rest, by the same keys
        other = make_engine(*tiny_model(), block_size=32, max_running=5)
        found = generate(other, begun(make(), first))
        for i, group in enumerate(found):
            for sample, completion in enumerate(group):
                was, want = first[i][sample], expected[i][sample]
                assert completion.tokens[: len(was.tokens)] == was.tokens
                assert completion.logprobs[: len(was.tokens)] == was.logprobs
                assert was.finish == Finish.ABORTED or completion == was
                assert_same(completion, want, f"{name}, prompt {i}, sample {sample}")


def test_a_state_with_stacked_caches_is_read() -> None:
    """The form in checkpoints of 0.2 and before: all layers' keys, then all layers' values."""
    make, options = CASES["few"]
    expected = generate(engine_of(options), make())
    engine = engine_of(options)
    generate(engine, make(), should_stop=stop_after(9))
    state = engine.aborted_state()
    caches = [state.pop(f"cache.{i}") for i in range(4)]
    state |= {"keys": torch.stack(caches[:2]), "values": torch.stack(caches[2:])}
    assert generate(engine_of(options), make(), state=state) == expected


def test_a_state_of_another_call_is_not_used() -> None:
    make, options = CASES["default"]
    engine = engine_of(options)
    first = generate(engine, make(), should_stop=stop_after(12))
    state = engine.aborted_state()
    assert tensor_json(state["engine"])["call"]["limits"] == [256, 2048]
    smaller = engine_of({"max_running": 3})
    found = generate(smaller, begun(make(), first), state=state)
    expected = generate(engine_of({"max_running": 3}), begun(make(), first))
    assert found == expected
    fewer = generate(engine_of(options), make()[:3], state=state)
    assert fewer == generate(engine_of(options), make()[:3])


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    engine = make_engine(*tiny_model())
    generate(engine, load(), should_stop=stop_after(5))
    assert engine.aborted_state() == {}
