"""Clauses on how an engine's calls end: finish reasons, stops, aborted calls, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from spmdrl.rollout.protocol import Completion, Finish, Request
from spmdrl.testing.clause import Findings, same
from spmdrl.testing.engine_models import EOS, VOCAB, prompts_of, request, spell
from spmdrl.testing.engine_subject import (
    EngineSubject,
    expect,
    generate,
    refused,
    stop_after,
    tokens_of,
)


def stop_texts_and_tokens_end_a_sample(subject: EngineSubject) -> Findings:
    """A sample ends with the token in which a stop text is complete, or with a stop token."""
    engine, prompt = subject.engine(), prompts_of(6)[0]

    def one(**sampling: Any) -> Completion:
        asked = [request(prompt, 0, max_tokens=30, ignore_eos=True, **sampling)]
        return generate(engine, asked)[0][0]

    whole = one()
    yield from same("finish and length", (whole.finish, len(whole.tokens)), (Finish.LENGTH, 30))
    text = spell(whole.tokens[8:10])[1:5]  # from the middle of one token into the next
    end = next(i for i in range(len(whole.tokens)) if text in spell(whole.tokens[: i + 1]))
    token = whole.tokens[4]
    cases: tuple[tuple[dict[str, Any], int], ...] = (
        ({"stop": ("never there", text)}, end),
        ({"stop_token_ids": (token,)}, whole.tokens.index(token)),
    )
    for given, last in cases:
        found = one(**given)
        yield from same(f"finish with {given}", found.finish, Finish.STOP)
        yield from same(f"tokens with {given}", found.tokens, whole.tokens[: last + 1])
        yield from same(f"logprobs with {given}", len(found.logprobs), last + 1)
    [[found]] = generate(
        engine, [request(prompt, 0, max_tokens=5, ignore_eos=True, stop=(spell(prompt[-1:]),))]
    )
    meets = spell(prompt[-1:]) in spell(found.tokens)
    yield from expect(
        meets or found.finish == Finish.LENGTH,
        "stop texts to be looked for in the response only",
        "one in the prompt ended it",
    )


def ends_of_text_are_kept_unless_ignored(subject: EngineSubject) -> Findings:
    """A model's end of text ends a sample, is its last token, and counts as a stop."""
    prompts = prompts_of(*([4] * 30))
    asked = [request(p, i, max_tokens=60, temperature=2.0) for i, p in enumerate(prompts)]
    found = [group[0] for group in generate(subject.engine(), asked)]
    ended = [completion for completion in found if completion.finish == Finish.STOP]
    yield from expect(bool(ended), "some of 30 samples to meet an end of text", "none")
    for completion in ended:
        right = completion.tokens[-1] == EOS and EOS not in completion.tokens[:-1]
        yield from expect(right, f"one end of text, {EOS}, and at the end", f"{completion.tokens}")
    cut = [c.tokens for c in found if c.finish == Finish.LENGTH and EOS in c.tokens]
    yield from expect(not cut, "samples with an end of text to finish as STOP", f"LENGTH: {cut}")


def stop_requests_abort_what_is_open(subject: EngineSubject) -> Findings:
    """A stop aborts open samples, keeps finished ones, and is over with the call; progress counts
    tokens and samples.
    """
    engine = subject.engine(max_running=2)
    asked = [
        request(p, i, max_tokens=20, ignore_eos=True) for i, p in enumerate(prompts_of(4, 5, 6))
    ]
    seen: list[tuple[int, int]] = []
    groups = generate(
        engine,
        asked,
        progress=lambda tokens, samples: seen.append((tokens, samples)),
        should_stop=lambda: len(seen) == 24,
    )
    found = [group[0] for group in groups]
    reasons = [completion.finish for completion in found]
    wanted = [Finish.LENGTH, Finish.LENGTH, Finish.ABORTED]
    yield from same("after a stop in step 25, finish", reasons, wanted)
    counts = [len(completion.tokens) for completion in found]
    yield from same("tokens of the samples", counts, [20, 20, 5])
    yield from same("the last progress", seen[-1:], [(45, 2)])
    again = generate(engine, asked)[2][0].finish
    yield from same("finish in the next call", again, Finish.LENGTH)


def aborted_calls_resume(subject: EngineSubject) -> Findings:
    """An aborted call ends as if it had not been stopped: bit for bit from its own state where the
    engine keeps one, and with the same tokens from what its samples had begun with.
    """
    engine = subject.engine(max_running=3)
    asked = [
        request(p, i, 1 + i % 2, max_tokens=14, ignore_eos=True)
        for i, p in enumerate(prompts_of(7, 20, 5, 33))
    ]
    whole = generate(engine, asked)
    yield from same("state of a call that ended", engine.aborted_state(), {})
    for count in (2, 9, 17):
        first = generate(engine, asked, should_stop=stop_after(count))
        state = engine.aborted_state()
        reasons = {completion.finish for group in first for completion in group}
        where = f"stopped after {count} questions"
        yield from expect(Finish.ABORTED in reasons, f"samples {where} to be open", f"{reasons}")
        yield from same("state that is asked for twice", engine.aborted_state(), {})
        if subject.has("resumed_calls"):
            yield from expect(bool(state), f"a state of a call {where}", "none")
            again = generate(engine, asked, state=state)
            yield from expect(again == whole, f"{where}, resumed: {whole}", f"{again}")
        begun = [replace(a, begun=tuple(g)) for a, g in zip(asked, first, strict=True)]
        after = generate(engine, begun)
        yield from same(f"tokens {where}, continued", tokens_of(after), tokens_of(whole))
        for a, b in zip(first, after, strict=True):
            changed = [
                x for x, y in zip(a, b, strict=True) if x != y and x.finish != Finish.ABORTED
            ]
            yield from expect(not changed, "finished samples to stay", f"{changed} changed")


def bad_requests_are_refused_by_name(subject: EngineSubject) -> Findings:
    """A request that can never be served is refused before any step, naming it and the limit."""
    engine, ran = subject.engine(), list[int]()
    good = request((7, 8), 0, max_tokens=2)

    def ask(bad: Request) -> None:
        generate(engine, [good, bad], progress=lambda *_: ran.append(1))

    cases: tuple[tuple[Request, tuple[str, ...]], ...] = (
        (request((7,) * 200, 3, max_tokens=57), ("need 257 positions", "has 256")),
        (request((), 4), ("empty prompt",)),
        (request((7, VOCAB), 5), (f"outside the vocabulary of {VOCAB}",)),
    )
    for bad, words in cases:
        yield from refused(partial(ask, bad), f"prompt_id {bad.prompt_id}", *words)
    yield from refused(lambda: engine.score([(7,) * 257]), "positions", "has 256")
    yield from same("steps before a refusal", len(ran), 0)
    count = len(generate(engine, [good])[0][0].tokens)
    yield from expect(count <= 2, "at most max_tokens=2 tokens after refusals", f"{count}")
    empty = generate(engine, []), generate(engine, [request((7,), 1, 0, max_tokens=2)])
    yield from same("samples of no requests, and of a request for none", empty, ([], [[]]))


ENDS = (
    stop_texts_and_tokens_end_a_sample,
    ends_of_text_are_kept_unless_ignored,
    stop_requests_abort_what_is_open,
    aborted_calls_resume,
    bad_requests_are_refused_by_name,
)
