"""Clauses on what an engine draws: which tokens, with which probabilities, by which keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from spmdrl.rollout.protocol import Request
from spmdrl.testing.clause import Findings, close, same
from spmdrl.testing.engine_models import (
    ARCHITECTURES,
    EOS,
    SIZES,
    allowed,
    hugging_face_model,
    logits_of,
    prompts_of,
    request,
    scores_of,
)
from spmdrl.testing.engine_subject import BOUND, EngineSubject, expect, generate, tokens_of

_LENGTHS = (3, 17, 32, 33, 8, 1, 40)
_NEW = 40

_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"ignore_eos": True, "max_tokens": 30},
)

_Tokens = Sequence[Sequence[tuple[int, ...]]]


def greedy_tokens_are_those_of_transformers(subject: EngineSubject) -> Findings:
    """Greedy decoding of a batch gives the tokens that transformers gives one by one: each has the
    best of its logits after those before it, up to an end of text.
    """
    prompts = prompts_of(*_LENGTHS)
    for name in ARCHITECTURES:
        reference = hugging_face_model(name, **SIZES)
        asked = [request(p, i, temperature=0, max_tokens=_NEW) for i, p in enumerate(prompts)]
        for prompt, [found] in zip(prompts, generate(subject.engine(name), asked), strict=True):
            where = f"of a prompt of {len(prompt)} tokens ({name})"
            with torch.no_grad():
                logits = reference(torch.tensor([(*prompt, *found.tokens)])).logits[0]
            own = logits[len(prompt) - 1 : -1]
            best = own.max(-1)
            for at, token in enumerate(found.tokens):
                lead = float(best.values[at] - own[at, token])
                wanted = f"token {at} {where} to be {int(best.indices[at])}"
                yield from expect(lead < BOUND, wanted, f"{token}, whose logit is {lead:.2e} less")
            ends = found.tokens.index(EOS) + 1 if EOS in found.tokens else _NEW
            yield from same(f"tokens {where}, up to an end:", len(found.tokens), ends)


def logprobs_are_those_of_the_trainer(subject: EngineSubject) -> Findings:
    """Every token has the log-probability that the trainer's model gives it under the request's
    own temperature and truncation, also where others of the batch have different ones.
    """
    decoder = subject.decoder()
    asked = [
        request(p, i, 3, **{"max_tokens": 25, **_SETTINGS[i % len(_SETTINGS)]})
        for i, p in enumerate(prompts_of(9, 20, 4, 33, 12, 5, 7, 30))
    ]
    found = generate(subject.engine(), asked)
    for i, (wanted, group) in enumerate(zip(asked, found, strict=True)):
        for completion in group:
            tokens = (*wanted.tokens, *completion.tokens)
            rows = logits_of(decoder, tokens)[len(wanted.tokens) - 1 : -1]
            logprobs = [
                allowed(row, wanted.sampling)[token]
                for row, token in zip(rows, completion.tokens, strict=True)
            ]
            what = f"logprobs under {_SETTINGS[i % len(_SETTINGS)]}"
            seen = torch.tensor(completion.logprobs)
            yield from close(what, seen, torch.stack(logprobs), atol=BOUND)


def draws_follow_the_distribution(subject: EngineSubject) -> Findings:
    """First tokens of many samples occur as often as their probabilities say.

    The mean surprise may be 5 standard deviations off; truncated tokens never occur.
    """
    decoder, prompt, count = subject.decoder(), prompts_of(12)[0], 300
    settings: tuple[dict[str, Any], ...] = ({"temperature": 1.5}, {"temperature": 2.0, "top_k": 6})
    for sampling in settings:
        asked = request(prompt, 5, count, max_tokens=1, ignore_eos=True, **sampling)
        [group] = generate(subject.engine(), [asked])
        logprobs = allowed(logits_of(decoder, prompt)[-1], asked.sampling)
        chances = logprobs.exp()
        surprise = -logprobs.masked_fill(chances == 0, 0.0)
        mean = float((chances * surprise).sum())
        deviation = float((chances * (surprise - mean) ** 2).sum() / count) ** 0.5
        drawn = torch.tensor([completion.tokens[0] for completion in group])
        never = [int(token) for token in drawn if chances[token] == 0]
        yield from expect(not never, f"no token that {sampling} leaves out", f"{never[:3]}")
        found = float(surprise[drawn].mean())
        yield from expect(
            abs(found - mean) <= 5 * deviation,
            f"a mean surprise of {mean:.3f} +- {5 * deviation:.3f} nats in {count} draws under "
            f"{sampling}",
            f"{found:.3f}",
        )


def samples_do_not_depend_on_neighbours(subject: EngineSubject) -> Findings:
    """A sample is the same beside other requests, without them, in another order of the requests,
    and among other samples of its prompt.
    """
    engine, prompts = subject.engine(), prompts_of(9, 33, 16, 40)
    asked = [
        request(p, 100 + i, samples, max_tokens=30, ignore_eos=True)
        for i, (p, samples) in enumerate(zip(prompts, (3, 1, 2, 4), strict=True))
    ]
    together = tokens_of(generate(engine, asked))
    alone = [tokens_of(generate(engine, [one]))[0] for one in asked]
    yield from _same(alone, together, asked, "as in a batch, where it is generated by itself")
    backwards = tokens_of(generate(engine, asked[::-1]))[::-1]
    yield from _same(backwards, together, asked, "in any order of the requests")
    [some] = tokens_of(generate(engine, [replace(asked[3], samples=(2, 0))]))
    wanted = [together[3][2], together[3][0]]
    yield from expect(some == wanted, f"samples 2 and 0 of a prompt to be {wanted}", f"{some}")


def _same(found: _Tokens, wanted: _Tokens, asked: Sequence[Request], how: str) -> Findings:
    for one, a, b in zip(asked, found, wanted, strict=True):
        yield from expect(a == b, f"prompt {one.prompt_id} {how}: {b}", f"{a}")


def long_prompts_draw_the_same_in_parts(subject: EngineSubject) -> Findings:
    """Prompts that are longer than `prefill_tokens` give the samples that they give at once."""
    prompts = prompts_of(50, 33, 41, 60)
    asked = [request(p, i, 2, max_tokens=6, ignore_eos=True) for i, p in enumerate(prompts)]
    at_once = tokens_of(generate(subject.engine(), asked))
    in_parts = tokens_of(generate(subject.engine(prefill_tokens=16, max_running=4), asked))
    yield from _same(in_parts, at_once, asked, "as at once, where a step computes 16 tokens")


def seed_step_prompt_and_sample_key_the_draws(subject: EngineSubject) -> Findings:
    """Draws repeat for the same keys, and differ where one of them does."""
    engine, prompt = subject.engine(), prompts_of(10)[0]

    def tokens(seed: int, step: int, prompt_id: int) -> tuple[tuple[int, ...], ...]:
        asked = [request(prompt, prompt_id, 2, max_tokens=12, ignore_eos=True)]
        return tuple(c.tokens for c in engine.generate(asked, seed=seed, step=step)[0])

    base = tokens(1, 1, 1)
    again = tokens(1, 1, 1)
    yield from expect(base == again, f"the same tokens for the same keys: {base}", f"{again}")
    yield from expect(base[0] != base[1], "two samples of a prompt to differ", f"{base[0]} twice")
    for key, other in (("seed", (2, 1, 1)), ("step", (1, 2, 1)), ("prompt_id", (1, 1, 2))):
        yield from expect(
            tokens(*other) != base, f"other tokens for another {key}", f"{base} for both"
        )


def global_random_numbers_are_left_alone(subject: EngineSubject) -> Findings:
    """Torch's own generator neither decides a draw nor moves with one."""
    engine = subject.engine()
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    asked = [request(prompts_of(10)[0], 0, 2, max_tokens=5)]
    first = generate(engine, asked)
    seen = torch.rand(3)
    yield from expect(
        torch.equal(seen, wanted), f"torch's next numbers to stay {wanted}", f"{seen}"
    )
    again = generate(engine, asked)
    yield from expect(
        again == first, "the same draws at another state of torch's generator", f"{again}"
    )


def scores_are_those_of_the_trainer(subject: EngineSubject) -> Findings:
    """`score` gives the trainer's log-probabilities of given tokens."""
    decoder, engine = subject.decoder(), subject.engine()
    sequences = prompts_of(5, 1, 33, 16, 40)
    for tokens, found in zip(sequences, engine.score(sequences), strict=True):
        what = f"scores of a row of {len(tokens)} tokens"
        yield from close(what, torch.tensor(found), scores_of(decoder, tokens), atol=BOUND)
    seen = [engine.score([]), engine.score([(3,)])]
    yield from expect(seen == [[], [[]]], "no scores of no rows and of single tokens", f"{seen}")


DRAWS = (
    greedy_tokens_are_those_of_transformers,
    logprobs_are_those_of_the_trainer,
    draws_follow_the_distribution,
    samples_do_not_depend_on_neighbours,
    long_prompts_draw_the_same_in_parts,
    seed_step_prompt_and_sample_key_the_draws,
    global_random_numbers_are_left_alone,
    scores_are_those_of_the_trainer,
)
