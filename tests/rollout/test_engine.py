"""The native engine: the same tokens as naive decoding, however it schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rollout_models import (
    assert_same,
    make_engine,
    naive,
    prompts_of,
    request,
    tiny_model,
)

from spmdrl.models.kernels import c_code
from spmdrl.models.kernels import cpu as panels
from spmdrl.models.kernels import cpu as rows
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import Completion, Request


def generate(engine: NativeEngine, asked: list[Request], **options: Any) -> list[list[Completion]]:
    return engine.generate(asked, seed=11, step=2, **options)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a machine without one runs: torch's own operations."""

    def forget() -> None:
        rows._rows.cache_clear()
        panels._code.cache_clear()

    monkeypatch.setattr(c_code, "load", lambda source, **constants: None)
    forget()
    assert rows.rows_for(torch.zeros(1)) is None
    yield
    forget()


LOAD: list[tuple[int, int, dict[str, Any]]] = [
    (9, 3, {"max_tokens": 40}),
    (33, 1, {"max_tokens": 25, "temperature": 0}),
    (16, 5, {"max_tokens": 30, "temperature": 0.7}),
    (1, 1, {"max_tokens": 50, "ignore_eos": True}),
    (21, 2, {"max_tokens": 1}),
    (40, 4, {"max_tokens": 60, "temperature": 1.5}),
]


def load() -> list[Request]:
    prompts = prompts_of(*(length for length, _, _ in LOAD))
    return [
        request(prompts[i], 100 + i, samples, margins=True, **sampling)
        for i, (_, samples, sampling) in enumerate(LOAD)
    ]


@pytest.fixture(scope="module")
def expected() -> list[list[Completion]]:
    config, source = tiny_model()
    return [
        [naive(config, source, asked, sample, seed=11, step=2) for sample in asked.samples]
        for asked in load()
    ]


CACHE_BLOCK = 2 * 2 * 2 * 8 * 16 * 4  # layers, keys and values, heads, tokens, head_dim, bytes


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"block_size": 1},
    {"block_size": 32},
    {"prefill_tokens": 7},
    {"max_running": 1},
    {"max_running": 3, "prefill_tokens": 16},
    {"kv_cache_gb": 15 * CACHE_BLOCK / 1e9},
    {"kv_cache_gb": 15 * CACHE_BLOCK / 1e9, "prefill_tokens": 5},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_tokens_equal_naive_decoding_however_scheduled(
    options: dict[str, Any], expected: list[list[Completion]]
) -> None:
    engine = make_engine(*tiny_model(), **options)
    found = generate(engine, load())
    for i, (group, want) in enumerate(zip(found, expected, strict=True)):
        assert len(group) == len(want)
        for sample, completion in enumerate(group):
            assert_same(completion, want[sample], f"{options}, prompt {i}, sample {sample}")
            assert len(completion.margins) == len(completion.tokens)
    assert ("kv_cache_gb" in options) == (engine.num_preempted > 0)


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_they_do_without_a_compiler(
    options: dict[str, Any], expected: list[list[Completion]], no_compiler: None
) -> None:
    test_tokens_equal_naive_decoding_however_scheduled(options, expected)


def test_prompts_with_a_common_beginning_share_it() -> None:
    config, source = tiny_model()
    head = prompts_of(70)[0]
    tails = prompts_of(5, 3, 30, 6, 6, 6)
    asked = [
        request(head + tail, i, samples, max_tokens=12, margins=True)
        for i, (tail, samples) in enumerate(zip(tails, (3, 1, 1, 8, 2, 1), strict=True))
    ]
    for options in ({}, {"block_size": 32}, {"prefill_tokens": 20}, {"max_running": 3}):
        found = generate(make_engine(config, source, **options), asked)
        for i, want in enumerate(asked):
            for sample in want.samples[:2]:
                alone = naive(config, source, want, sample, seed=11, step=2)
                assert_same(found[i][sample], alone, f"{options}, prompt {i}, sample {sample}")


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0, "top_k": 5}, {}])
def test_what_nothing_has_cut_was_drawn_from_all_tokens(sampling: dict[str, Any]) -> None:
    """Also where somebody asks for a greedy answer by the sampling of a run that truncates."""
    asked = request(prompts_of(5)[0], 1, 2, max_tokens=4, support=True, **sampling)
    for completion in generate(make_engine(*tiny_model()), [asked])[0]:
        assert completion.support is not None
        assert completion.support.counts.tolist() == [0] * len(completion.tokens)


def test_what_the_cache_cannot_hold_is_refused_before_anything_runs() -> None:
    config, source = tiny_model()
    engine = make_engine(config, source, kv_cache_gb=10 * CACHE_BLOCK / 1e9)
    ran: list[int] = []

    def refuse(asked: Request, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(engine, [good, asked], progress=lambda *_: ran.append(1))

    good = request((7, 8), 0, max_tokens=2)
    refuse(request((7,) * 50, 3, max_tokens=40), r"need 90 cache slots.*has 80.*kv_cache_gb")
    silent = NativeEngine(config)
    with pytest.raises(ValueError, match=r"no weights yet: embed_tokens\.weight"):
        generate(silent, [good])
    for name, held in engine.local_tensors().items():
        silent.adopt(name, held[0])
    with pytest.raises(ValueError, match="cannot detokenize"):
        generate(silent, [request((7,), 0, max_tokens=2, stop=("x",))])
    assert not ran
