"""Clauses on samples that take turns: their context, what was given, and calls that are stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spmdrl.rollout.protocol import Answer, Completion, Ending, Finish, Request, Turn
from spmdrl.testing.clause import Findings, same
from spmdrl.testing.engine_models import prompts_of, request
from spmdrl.testing.engine_subject import (
    BOUND,
    EngineSubject,
    expect,
    generate,
    stop_after,
    tokens_of,
)

_TURNS = 3
"""Most turns of a sample."""

_GIVEN, _DRAWN = 9, 7
"""Most tokens of an answer, and of a turn."""


def turns_continue_the_tokens_that_were_there(subject: EngineSubject) -> Findings:
    """A turn's context is the prompt, what was drawn and what was given, token by token; tokens
    that were given have no log-probability.
    """
    yield from _as_one_by_one(subject, begin_parts=False)


def parts_follow_their_own_context(subject: EngineSubject) -> Findings:
    """An answer that begins a part is all that the next turn follows: neither the prompt nor what
    was drawn and given before is seen, and both are kept.
    """
    yield from _as_one_by_one(subject, begin_parts=True)


def _as_one_by_one(subject: EngineSubject, *, begin_parts: bool) -> Findings:
    """Compare a call with its turns asked for one by one."""
    engine, asked = subject.engine(), _requests()
    found = generate(engine, asked, turns=_Answers(begin_parts=begin_parts))
    begun = any(c.parts for group in found for c in group)
    yield from expect(begun == begin_parts, "parts where answers begin them", f"{found}")
    yield from same("samples", [len(g) for g in found], [len(a.samples) for a in asked])
    for place, (own, group) in enumerate(zip(asked, found, strict=True)):
        for sample, seen in zip(own.samples, group, strict=True):
            where = f"of prompt {place}, sample {sample}"
            wanted = _one_by_one(subject, own, place, sample, begin_parts)
            yield from same(f"tokens {where}", seen.tokens, wanted.tokens)
            yield from same(f"parts {where}", seen.parts, wanted.parts)
            yield from same(f"given tokens {where}", seen.given, wanted.given)
            yield from same(f"rewards {where}", seen.rewards, wanted.rewards)
            ends = (seen.finish, seen.ending, seen.waits)
            yield from same(f"end {where}", ends, (wanted.finish, wanted.ending, None))
            pairs = list(zip(seen.logprobs, wanted.logprobs, strict=False))
            gap = max((abs(a - b) for a, b in pairs), default=0.0)
            yield from expect(
                len(pairs) == len(seen.tokens) and gap < BOUND,
                f"logprobs {where} as of turns asked one by one, 0 where tokens were given",
                f"{seen.logprobs}, not {wanted.logprobs}",
            )


def calls_stopped_within_turns_resume(subject: EngineSubject) -> Findings:
    """A call that is stopped within its samples' turns keeps the turns that ended, and resumes to
    the tokens that it would have had.
    """
    engine, asked = subject.engine(), _requests()
    whole = generate(engine, asked, turns=_Answers(begin_parts=True))
    for count in (3, 9, 16):
        stop = stop_after(count)
        first = generate(engine, asked, turns=_Answers(begin_parts=True), should_stop=stop)
        is_open = [c.finish is Finish.ABORTED for group in first for c in group]
        where = f"stopped after {count} questions"
        yield from expect(any(is_open), f"samples {where} to be open", "none")
        begun = [replace(a, begun=tuple(g)) for a, g in zip(asked, first, strict=True)]
        after = generate(engine, begun, turns=_Answers(begin_parts=True))
        yield from same(f"tokens {where}, continued", tokens_of(after), tokens_of(whole))
        found = [[(c.rewards, c.parts) for c in group] for group in after]
        expected = [[(c.rewards, c.parts) for c in group] for group in whole]
        yield from same(f"rewards and parts {where}, continued", found, expected)


class _Answers:
    """Answers that depend on the turn alone; half of them arrive when they are asked for again.

    Args:
        begin_parts: whether some begin a part.
    """

    def __init__(self, *, begin_parts: bool) -> None:
        self._begin_parts = begin_parts
        self._ready: list[Answer] = []
        self._late: list[Answer] = []

    def ended(self, turn: Turn) -> None:
        answer = _answer_to(turn, self._begin_parts)
        (self._late if (turn.number + turn.sample) % 2 else self._ready).append(answer)

    def answers(self, wait_s: float) -> Sequence[Answer]:
        found, self._ready, self._late = self._ready, self._late, []
        return found

    def states(self) -> Mapping[tuple[int, int], bytes]:
        return {}

    def heard(self) -> Mapping[tuple[int, int], Mapping[int, str]]:
        return {}


def _answer_to(turn: Turn, begin_parts: bool) -> Answer:
    total = sum(turn.tokens) + 7 * turn.number
    reward = turn.number - total / 4
    if turn.number == _TURNS - 1 or total % 7 == 0:
        return Answer(request=turn.request, sample=turn.sample, ending=Ending.DONE, reward=reward)
    return Answer(
        request=turn.request,
        sample=turn.sample,
        tokens=tuple((total + 13 * k) % 90 + 6 for k in range(1 + total % _GIVEN)),
        max_tokens=1 + total % _DRAWN,
        reward=reward,
        begins_part=begin_parts and total % 3 > 0,
    )


def _requests() -> list[Request]:
    """Make requests without chance: engines draw their random numbers in ways of their own."""
    most = _TURNS * (_GIVEN + _DRAWN)
    asked = [
        request(p, 40 + i, 1 + i % 2, max_tokens=_DRAWN, temperature=0)
        for i, p in enumerate(prompts_of(9, 33, 1, 21))
    ]
    return [replace(own, room=most) for own in asked]


def _one_by_one(
    subject: EngineSubject, own: Request, place: int, sample: int, begin_parts: bool
) -> Completion:
    """Ask for every turn as a request of its own, whose prompt is all that was there before in its
    part.
    """
    engine, limit = subject.engine(), own.sampling.max_tokens
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    given: list[tuple[int, int]] = []
    rewards: list[float] = []
    parts: list[int] = []
    while True:
        asked = replace(
            own,
            tokens=tokens[parts[-1] :] if parts else (*own.tokens, *tokens),
            samples=(sample,),
            sampling=own.sampling.model_copy(update={"max_tokens": limit}),
            room=0,
        )
        [[drawn]] = generate(engine, [asked])
        tokens, logprobs = (*tokens, *drawn.tokens), (*logprobs, *drawn.logprobs)
        answer = _answer_to(
            Turn(
                request=place,
                sample=sample,
                number=len(given),
                tokens=drawn.tokens,
                finish=drawn.finish,
            ),
            begin_parts,
        )
        rewards.append(answer.reward)
        if answer.max_tokens == 0:
            return Completion(
                tokens=tokens,
                logprobs=logprobs,
                finish=answer.ending.finish,
                given=tuple(given),
                parts=tuple(parts),
                rewards=tuple(rewards),
                ending=answer.ending,
            )
        given.append((len(tokens), len(tokens) + len(answer.tokens)))
        parts += [len(tokens)] * answer.begins_part
        tokens = (*tokens, *answer.tokens)
        logprobs = (*logprobs, *(0.0,) * len(answer.tokens))
        limit = answer.max_tokens


TURNS = (
    turns_continue_the_tokens_that_were_there,
    parts_follow_their_own_context,
    calls_stopped_within_turns_resume,
)
