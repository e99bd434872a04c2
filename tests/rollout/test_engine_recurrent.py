"""The native engine on a model of gated DeltaNet and gated attention layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from rollout_models import StateDict, assert_same, make_engine, prompts_of, request, tiny_model

from noise import gumbel
from spmdrl.keyed_random import key64, key_tensor
from spmdrl.models.attention import PackedAttention, make_kernel
from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.spans import Span
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import Completion, Finish, Request
from sweeps import swept
from tiny_model import load_into

SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_experts": 0,
    "tie_word_embeddings": True,
}


@cache
def model() -> tuple[ModelConfig, StateDict]:
    return tiny_model("Qwen3Next", **SIZES)


def requests() -> list[Request]:
    prompts = prompts_of(9, 33, 1, 21)
    sizes = [(3, 20), (1, 12), (2, 25), (4, 15)]
    return [
        request(prompt, 100 + i, samples, max_tokens=length, margins=True)
        for i, (prompt, (samples, length)) in enumerate(zip(prompts, sizes, strict=True))
    ]


def shared() -> list[Request]:
    """Requests with a long common beginning, which is computed once and shared."""
    (common, *ends) = prompts_of(130, 3, 9, 21)
    return [
        request((*common, *end), i, 2, max_tokens=8, ignore_eos=True, margins=True)
        for i, end in enumerate(ends)
    ]


def logits_of(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    attend = PackedAttention(
        [Span(q_start=0, q_stop=len(tokens), own=(0, len(tokens)))],
        make_kernel("blocked"),
        options=attention_options(decoder.model),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    hidden = decoder(torch.tensor(tokens), torch.arange(len(tokens)), attend)
    return hidden[-1] @ decoder.head_weight().T


@torch.no_grad()
def naive(asked: Request, sample: int) -> Completion:
    """One sample by computing the whole sequence anew for every token."""
    config, source = model()
    decoder = Decoder(config, device="cpu")
    load_into(decoder, source)
    tokens, logprobs, margins = list(asked.tokens), [], []
    finish = Finish.LENGTH
    for _ in range(asked.sampling.max_tokens):
        logits = logits_of(decoder, tokens)
        key = key_tensor([key64(11, 2, asked.prompt_id, sample, len(tokens))], logits.device)
        best = (logits + gumbel(key, 0, config.vocab_size)[0]).topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        margins.append(float(best.values[0] - best.values[1]))
        if tokens[-1] in config.eos_ids and not asked.sampling.ignore_eos:
            finish = Finish.STOP
            break
    return Completion(
        tokens=tuple(tokens[len(asked.tokens) :]),
        logprobs=tuple(logprobs),
        finish=finish,
        margins=tuple(margins),
    )


@cache
def expected(make: Callable[[], list[Request]]) -> list[list[Completion]]:
    return [[naive(asked, sample) for sample in asked.samples] for asked in make()]


def generate(engine: NativeEngine, asked: list[Request], **more: Any) -> list[list[Completion]]:
    return engine.generate(asked, seed=11, step=2, **more)


STATES = 3 * 4 * (4 * 16 * 24 + 3 * (2 * 2 * 16 + 4 * 24))  # bytes of one slot's three layers
BLOCK = 2 * 2 * 8 * 16 * 4  # keys and values, heads, tokens, head_dim, bytes; of one layer
CASES: dict[str, tuple[Callable[[], list[Request]], dict[str, Any]]] = {
    "default": (requests, {}),
    "chunks": (requests, {"prefill_tokens": 7}),
    "few": (requests, {"max_running": 2, "prefill_tokens": 16}),
    "preempted": (
        requests,
        {"kv_cache_gb": (11 * BLOCK + 7 * STATES) / 1e9, "max_running": 4, "prefill_tokens": 5},
    ),
    "shared": (shared, {"prefill_tokens": 40}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_gives_the_tokens_of_whole_sequences(name: str) -> None:
    make, options = CASES[name]
    engine = make_engine(*model(), **options)
    found = generate(engine, make())
    for i, group in enumerate(expected(make)):
        for sample, want in enumerate(group):
            assert_same(found[i][sample], want, f"{name}, prompt {i}, sample {sample}")
    assert (engine.num_preempted > 0) == (name == "preempted")


def stops(questions: Iterator[int], count: int) -> bool:
    """Whether this is the `count`-th question or a later one."""
    return next(questions) >= count


@pytest.mark.parametrize("name", swept(["few", "preempted", "shared"], ["preempted"]))
def test_a_stopped_call_resumes_bit_for_bit(name: str) -> None:
    make, options = CASES[name]
    steps: list[int] = []
    whole = generate(
        make_engine(*model(), **options), make(), should_stop=lambda: bool(steps.append(0))
    )
    for count in (2, len(steps) // 2, len(steps) - 2):
        questions = iter(range(1, 1000))
        engine = make_engine(*model(), keeps_aborted=True, **options)
        generate(engine, make(), should_stop=partial(stops, questions, count))
        state = engine.aborted_state()
        other = make_engine(*model(), **options)
        generate(other, make()[:1])  # whatever its states held before
        assert generate(other, make(), state=state) == whole


def test_the_states_count_as_cache() -> None:
    engine = make_engine(*model(), kv_cache_gb=(20 * BLOCK + 6 * STATES) / 1e9, max_running=4)
    generate(engine, requests()[:1])
    # a slot for each of three samples, two spare ones, and the one of idle rows
    assert engine.cache_bytes() == 20 * BLOCK + 6 * STATES


def test_scores_are_the_log_probabilities_of_whole_sequences() -> None:
    config, source = model()
    engine = make_engine(config, source, prefill_tokens=10)
    sequences = prompts_of(30, 17)
    decoder = Decoder(config, device="cpu")
    load_into(decoder, source)
    with torch.no_grad():
        for tokens, scores in zip(sequences, engine.score(sequences), strict=True):
            wanted = [
                float(logits_of(decoder, list(tokens[:i])).log_softmax(-1)[tokens[i]])
                for i in range(1, len(tokens))
            ]
            assert torch.tensor(scores) == pytest.approx(torch.tensor(wanted), abs=1e-4)
