"""What every rollout engine does: `CHECKS` are functions of a maker of engines.

A maker takes a model's name and makes an engine with its weights, for `spell`ed stop texts. An
engine is not used after its maker was asked for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import pytest
import torch
from rollout_models import (
    EOS,
    VOCAB,
    StateDict,
    assert_same,
    dense,
    hugging_face_model,
    naive,
    prompts_of,
    request,
    spell,
    tiny_model,
)
from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.decoder import Decoder
from spmdrl.rollout.protocol import Completion, Finish, Request, RolloutEngine, SamplingParams
from tiny_model import load_into

LENGTHS = (3, 17, 32, 33, 8, 1, 40)
SIZES = {"hidden_size": 128, "head_dim": 32}
"""vLLM attends with heads of 32 values or more on a CPU."""


class Maker(Protocol):
    def __call__(self, name: str = "Llama", **options: Any) -> RolloutEngine: ...


def model(name: str = "Llama") -> tuple[ModelConfig, StateDict]:
    return tiny_model(name, **SIZES)


def generate(engine: RolloutEngine, asked: list[Request], **options: Any) -> list[list[Completion]]:
    return engine.generate(asked, seed=11, step=2, **options)


def decoder_of(name: str = "Llama") -> Decoder:
    config, source = model(name)
    decoder = Decoder(config, device="cpu")
    load_into(decoder, source)
    return decoder


@torch.no_grad()
def logits_of(decoder: Decoder, tokens: tuple[int, ...]) -> Tensor:
    """[T, V] of a sequence, computed at once."""
    hidden = decoder(torch.tensor(tokens), torch.arange(len(tokens)), dense)
    return hidden @ decoder.head_weight().T


def allowed(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Log-probabilities [V] of the sampling distribution: truncated, in this project's order."""
    if sampling.is_greedy:
        return logits.log_softmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        order = logits.argsort(descending=True)
        before = logits.softmax(-1)[order].cumsum(0) - logits.softmax(-1)[order]
        logits = logits.clone()
        logits[order[before >= sampling.top_p]] = -torch.inf
    if sampling.min_p > 0:
        chances = logits.softmax(-1)
        logits = logits.masked_fill(chances < sampling.min_p * chances.max(), -torch.inf)
    return logits.log_softmax(-1)


def greedy_tokens_equal_transformers(make: Maker) -> None:
    for name in ("Llama", "Qwen2", "Qwen3", "Mistral"):
        reference, (config, source) = hugging_face_model(name, **SIZES), model(name)
        prompts = prompts_of(*LENGTHS)
        asked = [request(p, i, temperature=0, max_tokens=40) for i, p in enumerate(prompts)]
        found = generate(make(name), asked)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = reference.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
                )
            tokens = tuple(out[0, len(prompt) :].tolist())
            expected = naive(config, source, asked[i], 0, seed=11, step=2)
            assert expected.tokens == tokens
            assert_same(found[i][0], expected, f"{name}, prompt {i}")


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"ignore_eos": True, "max_tokens": 30},
]


def logprobs_are_those_of_the_sampling_distribution(make: Maker) -> None:
    """Parameters are the request's own, also where others of the batch have different ones."""
    decoder = decoder_of()
    asked = [
        request(p, i, 3, **{"max_tokens": 25, **SETTINGS[i % len(SETTINGS)]})
        for i, p in enumerate(prompts_of(9, 20, 4, 33, 12, 5, 7, 30))
    ]
    for wanted, group in zip(asked, generate(make(), asked), strict=True):
        for completion in group:
            tokens = (*wanted.tokens, *completion.tokens)
            logits = logits_of(decoder, tokens)[len(wanted.tokens) - 1 : -1]
            for row, token, found in zip(
                logits, completion.tokens, completion.logprobs, strict=True
            ):
                expected = float(allowed(row, wanted.sampling)[token])
                assert abs(found - expected) < 1e-4, (wanted.sampling, found, expected)


def results_do_not_depend_on_what_is_served_together(make: Maker) -> None:
    engine, prompts = make(), prompts_of(9, 33, 16, 40)
    asked = [
        request(p, 100 + i, samples, max_tokens=30, ignore_eos=True)
        for i, (p, samples) in enumerate(zip(prompts, (3, 1, 2, 4), strict=True))
    ]
    together = generate(engine, asked)
    alone = [generate(engine, [one])[0] for one in asked]
    assert [[c.tokens for c in group] for group in alone] == [
        [c.tokens for c in group] for group in together
    ]
    # some samples of a request, in another order
    [some] = generate(engine, [replace(asked[3], samples=(2, 0))])
    assert [c.tokens for c in some] == [together[3][2].tokens, together[3][0].tokens]


def prompts_longer_than_a_step_draw_the_same(make: Maker) -> None:
    prompts = prompts_of(50, 33, 41, 60)
    asked = [request(p, i, 2, max_tokens=6, ignore_eos=True) for i, p in enumerate(prompts)]
    at_once = generate(make(), asked)
    in_parts = generate(make(prefill_tokens=16, max_running=4), asked)
    assert [[c.tokens for c in group] for group in in_parts] == [
        [c.tokens for c in group] for group in at_once
    ]


def seed_step_prompt_and_sample_key_the_draws(make: Maker) -> None:
    engine, prompt = make(), prompts_of(10)[0]

    def tokens(seed: int, step: int, prompt_id: int) -> tuple[tuple[int, ...], ...]:
        asked = [request(prompt, prompt_id, 2, max_tokens=12, ignore_eos=True)]
        return tuple(c.tokens for c in engine.generate(asked, seed=seed, step=step)[0])

    base = tokens(1, 1, 1)
    assert base == tokens(1, 1, 1) and base[0] != base[1]
    assert len({base, tokens(2, 1, 1), tokens(1, 2, 1), tokens(1, 1, 2)}) == 4


def global_random_numbers_are_left_alone(make: Maker) -> None:
    engine = make()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    asked = [request(prompts_of(10)[0], 0, 2, max_tokens=5)]
    first = generate(engine, asked)
    assert torch.equal(torch.rand(3), expected)
    assert generate(engine, asked) == first


def stop_texts_and_tokens_end_a_sample(make: Maker) -> None:
    engine, prompt = make(), prompts_of(6)[0]

    def one(**sampling: Any) -> Completion:
        asked = [request(prompt, 0, max_tokens=30, ignore_eos=True, **sampling)]
        return generate(engine, asked)[0][0]

    whole = one()
    assert whole.finish == Finish.LENGTH and len(whole.tokens) == 30
    text = spell(whole.tokens[8:10])[1:5]  # from the middle of one token into the next
    end = next(i for i in range(30) if text in spell(whole.tokens[: i + 1]))
    stopped = one(stop=("never there", text))
    assert stopped.finish == Finish.STOP and stopped.tokens == whole.tokens[: end + 1]
    token = whole.tokens[4]
    stopped = one(stop_token_ids=(token,))
    assert stopped.finish == Finish.STOP
    assert stopped.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    assert len(stopped.logprobs) == len(stopped.tokens)
    # a text of the prompt does not count
    asked = [request(prompt, 0, max_tokens=5, ignore_eos=True, stop=(spell(prompt[-1:]) + "zz",))]
    assert generate(engine, asked)[0][0].finish == Finish.LENGTH


def end_of_text_is_kept_unless_ignored(make: Maker) -> None:
    prompts = prompts_of(*([4] * 30))
    asked = [request(p, i, max_tokens=60, temperature=2.0) for i, p in enumerate(prompts)]
    found = [group[0] for group in generate(make(), asked)]
    ended = [c for c in found if c.finish == Finish.STOP]
    assert ended and all(c.tokens[-1] == EOS and EOS not in c.tokens[:-1] for c in ended)
    assert all(EOS not in c.tokens for c in found if c.finish == Finish.LENGTH)


def a_stop_request_aborts_what_is_open_and_progress_is_told(make: Maker) -> None:
    engine = make(max_running=2)
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
    assert [group[0].finish for group in found] == [Finish.LENGTH, Finish.LENGTH, Finish.ABORTED]
    assert [len(group[0].tokens) for group in found] == [20, 20, 5]
    assert seen[-1] == (45, 2)
    assert generate(engine, asked)[2][0].finish == Finish.LENGTH


def bad_requests_are_refused_before_anything_runs(make: Maker) -> None:
    engine = make()
    good, ran = request((7, 8), 0, max_tokens=2), []

    def refuse(asked: Request, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(engine, [good, asked], progress=lambda *_: ran.append(1))

    refuse(request((7,) * 200, 3, max_tokens=57), r"prompt_id 3.*need 257 positions.*has 256")
    refuse(request((), 3), "empty prompt")
    refuse(request((7, VOCAB), 3), f"outside the vocabulary of {VOCAB}")
    with pytest.raises(ValueError, match=r"need 25\d positions.*has 256"):
        engine.score([(7,) * 257])
    assert not ran
    assert len(generate(engine, [good])[0][0].tokens) <= 2
    assert generate(engine, []) == []
    assert generate(engine, [request((7,), 1, 0, max_tokens=2)]) == [[]]


def scores_are_those_of_the_decoder(make: Maker) -> None:
    decoder, engine = decoder_of(), make()
    sequences = prompts_of(5, 1, 33, 16, 40)
    for tokens, found in zip(sequences, engine.score(sequences), strict=True):
        logprobs = logits_of(decoder, tokens)[:-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(tokens)[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    assert engine.score([]) == [] and engine.score([(3,)]) == [[]]


def weights_that_are_not_finite_are_named(make: Maker) -> None:
    engine = make()
    weight = engine.local_tensors()["norm.weight"][0]
    kept = weight.clone()
    asked = [request((7, 8), 42, max_tokens=3)]
    before = generate(engine, asked)
    weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="prompt 42 are not finite"):
        generate(engine, asked)
    weight.copy_(kept)
    assert generate(engine, asked) == before


def adopted_weights_are_the_trainers_own_storage(make: Maker) -> None:
    """What an optimizer step changes is seen, without a copy: nothing outlives a call."""
    engine, decoder = make(), decoder_of()
    for name, parameter in decoder.named_parameters():
        engine.adopt(name, parameter)
    held = engine.local_tensors()
    for name, parameter in decoder.named_parameters():
        assert held[name][0].data_ptr() == parameter.data_ptr()
        assert parameter.requires_grad
    prompt = prompts_of(40)[0]
    asked = [request(prompt, 0, temperature=0, max_tokens=10, ignore_eos=True)]
    before = generate(engine, asked)[0][0].tokens
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(8)))
    [[after]] = generate(engine, asked)
    assert before != after.tokens
    logits = logits_of(decoder, (*prompt, *after.tokens))[len(prompt) - 1 : -1]
    assert tuple(logits.argmax(-1).tolist()) == after.tokens
    with pytest.raises(ValueError, match=r"norm\.weight: the engine cannot use"):
        engine.adopt("norm.weight", torch.zeros(3))


CHECKS: dict[str, Callable[[Maker], None]] = {
    check.__name__: check
    for check in (
        greedy_tokens_equal_transformers,
        logprobs_are_those_of_the_sampling_distribution,
        results_do_not_depend_on_what_is_served_together,
        prompts_longer_than_a_step_draw_the_same,
        seed_step_prompt_and_sample_key_the_draws,
        global_random_numbers_are_left_alone,
        stop_texts_and_tokens_end_a_sample,
        end_of_text_is_kept_unless_ignored,
        a_stop_request_aborts_what_is_open_and_progress_is_told,
        bad_requests_are_refused_before_anything_runs,
        scores_are_those_of_the_decoder,
        weights_that_are_not_finite_are_named,
        adopted_weights_are_the_trainers_own_storage,
    )
}
