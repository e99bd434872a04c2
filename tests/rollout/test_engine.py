"""The native engine: the same tokens as naive decoding, however it schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rollout_models import (
    ARCHITECTURES,
    EOS,
    VOCAB,
    assert_same,
    hugging_face_model,
    make_engine,
    naive,
    prompts_of,
    request,
    spell,
    tiny_model,
)
from torch import Tensor

from spmdrl.models.decoder import Decoder
from spmdrl.models.hf import load_into
from spmdrl.rollout.native.engine import NativeEngine, NativeOptions
from spmdrl.rollout.protocol import Completion, Request

LENGTHS = (3, 17, 32, 33, 8, 1, 40)


def generate(engine: NativeEngine, asked: list[Request], **options: Any) -> list[list[Completion]]:
    return engine.generate(asked, seed=11, step=2, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    model = hugging_face_model(name)
    config, source = tiny_model(name)
    prompts = prompts_of(*LENGTHS)
    asked = [
        request(p, i, temperature=0, max_tokens=40, margins=True) for i, p in enumerate(prompts)
    ]
    found = generate(make_engine(config, source), asked)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
            )
        tokens = tuple(out[0, len(prompt) :].tolist())
        finish = "stop" if EOS in tokens else "length"
        expected = Completion(tokens=tokens, logprobs=(), finish=finish)
        assert_same(found[i][0], expected, f"{name}, prompt {i}")
    assert all(len(c.logprobs) == len(c.tokens) for group in found for c in group)


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 1},
        {"block_size": 32},
        {"prefill_tokens": 7},
        {"max_running": 1},
        {"max_running": 3, "prefill_tokens": 16},
        {"kv_cache_gb": 15 * CACHE_BLOCK / 1e9},
        {"kv_cache_gb": 15 * CACHE_BLOCK / 1e9, "prefill_tokens": 5},
    ],
    ids=str,
)
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


def test_results_do_not_depend_on_what_is_served_together(
    expected: list[list[Completion]],
) -> None:
    config, source = tiny_model()
    halves = [make_engine(config, source), make_engine(config, source)]
    asked = load()
    # samples of one request on two engines, other requests beside them
    first = [asked[0], Request(**{**vars(asked[5]), "samples": (2, 0)})]
    second = [Request(**{**vars(asked[5]), "samples": (3,)}), *asked[1:3]]
    found = [generate(engine, part) for engine, part in zip(halves, (first, second), strict=True)]
    assert_same(found[0][0][2], expected[0][2])
    assert_same(found[0][1][0], expected[5][2])
    assert_same(found[0][1][1], expected[5][0])
    assert_same(found[1][0][0], expected[5][3])
    assert_same(found[1][2][4], expected[2][4])


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


def test_seed_step_prompt_and_sample_key_the_draws() -> None:
    engine = make_engine(*tiny_model())
    prompt = prompts_of(10)[0]

    def tokens(seed: int, step: int, prompt_id: int) -> tuple[tuple[int, ...], ...]:
        asked = [request(prompt, prompt_id, 2, max_tokens=12, ignore_eos=True)]
        return tuple(c.tokens for c in engine.generate(asked, seed=seed, step=step)[0])

    base = tokens(1, 1, 1)
    assert base == tokens(1, 1, 1) and base[0] != base[1]
    assert len({base, tokens(2, 1, 1), tokens(1, 2, 1), tokens(1, 1, 2)}) == 4


def test_stop_texts_and_tokens_end_a_sample() -> None:
    engine = make_engine(*tiny_model())
    prompt = prompts_of(6)[0]

    def one(**sampling: Any) -> Completion:
        asked = [request(prompt, 0, max_tokens=30, ignore_eos=True, **sampling)]
        return generate(engine, asked)[0][0]

    whole = one()
    assert whole.finish == "length" and len(whole.tokens) == 30
    text = spell(whole.tokens[8:10])[1:5]  # from the middle of one token into the next
    end = next(i for i in range(30) if text in spell(whole.tokens[: i + 1]))
    stopped = one(stop=("never there", text))
    assert stopped.finish == "stop" and stopped.tokens == whole.tokens[: end + 1]
    token = whole.tokens[4]
    stopped = one(stop_token_ids=(token,))
    assert stopped.finish == "stop"
    assert stopped.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    assert len(stopped.logprobs) == len(stopped.tokens)


def test_a_prompt_may_hold_a_stop_text() -> None:
    engine = make_engine(*tiny_model())
    prompt = prompts_of(6)[0]
    asked = [request(prompt, 0, max_tokens=5, ignore_eos=True, stop=(spell(prompt[-1:]) + "zz",))]
    assert generate(engine, asked)[0][0].finish == "length"


def test_end_of_text_is_kept_unless_ignored() -> None:
    config, source = tiny_model()
    engine = make_engine(config, source)
    prompts = prompts_of(*([4] * 30))
    asked = [request(p, i, max_tokens=60, temperature=2.0) for i, p in enumerate(prompts)]
    found = [group[0] for group in generate(engine, asked)]
    ended = [c for c in found if c.finish == "stop"]
    assert ended and all(c.tokens[-1] == EOS and EOS not in c.tokens[:-1] for c in ended)
    assert all(EOS not in c.tokens for c in found if c.finish == "length")


def test_a_stop_request_aborts_what_is_open_and_progress_is_told() -> None:
    engine = make_engine(*tiny_model(), max_running=2)
    asked = [
        request(p, i, max_tokens=20, ignore_eos=True) for i, p in enumerate(prompts_of(4, 5, 6))
    ]
    seen: list[tuple[int, int]] = []
    found = generate(
        engine,
        asked,
        progress=lambda tokens, samples: seen.append((tokens, samples)),
        should_stop=lambda: len(seen) == 24,
    )
    finishes = [group[0].finish for group in found]
    assert finishes == ["length", "length", "aborted"]
    assert [len(group[0].tokens) for group in found] == [20, 20, 5]
    assert seen[-1] == (45, 2)
    assert generate(engine, asked)[2][0].finish == "length"


def test_bad_requests_are_refused_before_anything_runs() -> None:
    config, source = tiny_model()
    engine = make_engine(config, source, kv_cache_gb=10 * CACHE_BLOCK / 1e9)
    ran: list[int] = []

    def refuse(asked: Request, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(engine, [good, asked], progress=lambda *_: ran.append(1))

    good = request((7, 8), 0, max_tokens=2)
    refuse(request((7,) * 200, 3, max_tokens=57), r"prompt_id 3.*need 257 positions.*has 256")
    refuse(request((7,) * 50, 3, max_tokens=40), r"need 90 cache slots.*has 80.*kv_cache_gb")
    refuse(request((), 3), "empty prompt")
    refuse(request((7, VOCAB), 3), "outside the vocabulary of 128")
    silent = NativeEngine(config)
    with pytest.raises(ValueError, match=r"no weights yet: embed_tokens\.weight"):
        generate(silent, [good])
    for name, held in engine.local_tensors().items():
        silent.adopt(name, held[0])
    with pytest.raises(ValueError, match="cannot detokenize"):
        generate(silent, [request((7,), 0, max_tokens=2, stop=("x",))])
    assert not ran
    assert generate(engine, []) == [] and generate(engine, [request((7,), 1, 0, max_tokens=2)]) == [
        []
    ]


def test_adopted_weights_are_the_trainers_own_storage() -> None:
    config, source = tiny_model()
    decoder = Decoder(config, device="cpu")
    load_into(decoder, source)
    engine = NativeEngine(config, options=NativeOptions(block_size=8))
    for name, parameter in decoder.named_parameters():
        engine.adopt(name, parameter)
    held = engine.local_tensors()
    for name, parameter in decoder.named_parameters():
        assert held[name][0].data_ptr() == parameter.data_ptr()
        assert parameter.requires_grad
    asked = [request(prompts_of(6)[0], 0, temperature=0, max_tokens=10, ignore_eos=True)]
    before = generate(engine, asked)[0][0].tokens
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    after = generate(engine, asked)[0][0]
    assert before != after.tokens
    fresh = make_engine(config, type(source)(source_of(decoder)))
    assert generate(fresh, asked)[0][0].tokens == after.tokens
    with pytest.raises(ValueError, match=r"norm\.weight: the engine cannot use"):
        engine.adopt("norm.weight", torch.zeros(3))


def source_of(decoder: Decoder) -> dict[str, Tensor]:
    """Hugging Face tensors of an unsharded decoder."""
    from spmdrl.models.sharding import all_slices

    parameters = dict(decoder.named_parameters())
    return {
        part.name: parameters[name].detach()[part.offset : part.offset + part.rows]
        for name, held in all_slices(decoder.config, 0, 1).items()
        for part in held
    }


def test_weights_that_are_not_finite_are_named() -> None:
    config, source = tiny_model()
    engine = make_engine(config, source)
    weight = engine.local_tensors()["norm.weight"][0]
    kept = weight.clone()
    asked = [request((7, 8), 42, max_tokens=3)]
    before = generate(engine, asked)
    weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="prompt 42 are not finite"):
        generate(engine, asked)
    weight.copy_(kept)
    assert generate(engine, asked) == before
