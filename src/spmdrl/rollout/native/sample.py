"""`Sample`: one sample on its way from prompt to completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from spmdrl.keyed_random import chain, key64
from spmdrl.rollout.native.support import SupportRecord
from spmdrl.rollout.protocol import Completion, Ending, Finish, Request


@dataclass(kw_only=True, eq=False)
class Clock:
    """Number of steps that a scheduler has planned."""

    steps: int = 0


@dataclass(kw_only=True, eq=False)
class Sample:
    """State of one sample.

    Args:
        request: the request that the sample belongs to.
        index: the request's place in the call.
        place: the sample's place in the request.
        key: random key of (seed, step, prompt id, sample); a token's key adds its position.
        tokens: the prompt's and the generated tokens; of a sample with parts, those of its last
            part, whose prompt is among them.
        earlier: the generated tokens of the parts before the last one.
        parts: places of the generated tokens at which a part begins.
        followers: samples of the same prompt that wait for this one to compute it.
        blocks: cache blocks, in the order of the tokens they hold.
        slot: slot of recurrent layers' states, if the model has any and the sample is computed.
        order: number by which running samples are ordered, oldest first; -1 if it does not run.
        due: the step before which its block for the next token must be looked at.
        expert_rows: rows of an `ExpertRecord`, for the first tokens.
        given: ranges of the generated tokens that were given in answer to its turns.
        turn_limit: most tokens of its turn, if its answer said so.
        waits: reason of its turn's end while that is not answered.
        rewards: rewards of its answered turns.
        ending: reason why its turns ended.
    """

    request: Request
    index: int
    place: int
    key: int
    tokens: list[int]
    earlier: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    followers: list[Sample] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    order: int = -1
    due: int = -1
    expert_rows: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    support: SupportRecord = field(default_factory=lambda: SupportRecord())
    finish: Finish = Finish.ABORTED
    given: list[tuple[int, int]] = field(default_factory=list)
    turn_limit: int | None = None
    waits: Finish | None = None
    rewards: list[float] = field(default_factory=list)
    ending: Ending | None = None
    _cached: int = field(default=0, init=False)
    _clock: Clock | None = field(default=None, init=False)

    @property
    def cached(self) -> int:
        """Number of tokens whose keys and values are in the cache."""
        return self._cached if self._clock is None else self._cached + self._clock.steps

    @cached.setter
    def cached(self, number: int) -> None:
        self._cached, self._clock = number, None

    @property
    def is_seated(self) -> bool:
        """Whether it decodes in every step: `cached` then grows with its scheduler's clock, and its
        newest results may be in a `Ledger` instead of its own lists.
        """
        return self._clock is not None

    def seat(self, clock: Clock) -> None:
        """Count a cached token for each step from now on, until `cached` is set."""
        self._cached, self._clock = self.cached - clock.steps, clock

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.earlier) + len(self.tokens) - self._own_from

    @property
    def _own_from(self) -> int:
        """Place in `tokens` of the first generated one."""
        return 0 if self.parts else len(self.request.tokens)

    @property
    def generated(self) -> list[int]:
        """The generated tokens of all parts."""
        return [*self.earlier, *self.tokens[self._own_from :]]

    def set_generated(self, tokens: Sequence[int], parts: Sequence[int]) -> None:
        """Set what was generated, with the places at which a part begins."""
        start = parts[-1] if parts else 0
        self.parts, self.earlier = list(parts), list(tokens[:start])
        self.tokens = [*(() if parts else self.request.tokens), *tokens[start:]]

    @property
    def turn_length(self) -> int:
        """Number of tokens drawn in its turn so far."""
        return self.num_generated - (self.given[-1][1] if self.given else 0)

    def answer(self, tokens: Sequence[int], max_tokens: int, *, begins_part: bool) -> None:
        """Continue after its turn with tokens that are given, see `Answer`."""
        first = self.num_generated
        if begins_part:
            assert not self.request.sampling.experts, "experts are recorded for one context"
            self.set_generated(self.generated, [*self.parts, first])
        self.given.append((first, first + len(tokens)))
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        if self.request.sampling.margins:
            self.margins += [0.0] * len(tokens)
        if self.request.sampling.support:
            for _ in tokens:
                self.support.append(b"")
        self.turn_limit, self.waits = max_tokens, None

    def restart(self) -> None:
        """Drop all that follows its prompt."""
        self.set_generated((), ())
        del self.expert_rows[self.prompt_length :]
        self.logprobs, self.margins, self.support = [], [], SupportRecord()
        self.given, self.rewards, self.turn_limit, self.waits = [], [], None, None

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is not in the cache yet."""
        if self._clock is not None:
            return True
        return self._cached == len(self.tokens) - 1 and self.num_generated > 0

    @property
    def next_number(self) -> int:
        """Number of the next token, of which its random key is made: with parts it is not its
        place among `tokens`.
        """
        return self.prompt_length + self.num_generated

    def next_key(self) -> int:
        """Return the random key of the next token: no two tokens of a sample have the same."""
        return chain(self.key, self.next_number)

    def begun_experts(self) -> Tensor | None:
        """Return the choices of experts that came with the request, if any."""
        return self.request.begun[self.place].experts if self.request.begun else None

    def completion(self, experts: Tensor | None = None) -> Completion:
        return Completion(
            tokens=tuple(self.generated),
            logprobs=tuple(self.logprobs),
            finish=self.finish,
            margins=tuple(self.margins),
            experts=experts,
            support=self.support.column(self.num_generated)
            if self.request.sampling.support
            else None,
            given=tuple(self.given),
            parts=tuple(self.parts),
            waits=self.waits,
            turn_limit=self.turn_limit if self.finish is Finish.ABORTED else None,
            rewards=tuple(self.rewards),
            ending=self.ending,
        )


def samples_of(request: Request, index: int, *, seed: int, step: int) -> list[Sample]:
    """Make the samples of a request, with the tokens that they have drawn before."""
    samples = [
        Sample(
            request=request,
            index=index,
            place=place,
            key=key64(seed, step, request.prompt_id, sample),
            tokens=list(request.tokens),
        )
        for place, sample in enumerate(request.samples)
    ]
    for sample, begun in zip(samples, request.begun, strict=False):
        sample.set_generated(begun.tokens, begun.parts)
        sample.logprobs, sample.margins = list(begun.logprobs), list(begun.margins)
        sample.finish, sample.waits, sample.given = begun.finish, begun.waits, list(begun.given)
        sample.turn_limit, sample.rewards = begun.turn_limit, list(begun.rewards)
        sample.ending = begun.ending
        if begun.support is not None:
            sample.support = SupportRecord.of(begun.support)
    return samples


def leaders_of(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    """List the samples with which a scheduler begins: each group's first fresh sample, which
    computes the prompt for the other fresh ones, and each resumed sample; none that is complete or
    waits for an answer.
    """
    leaders = []
    for group in groups:
        samples = [sample for sample in group if sample.finish is Finish.ABORTED]
        fresh = [sample for sample in samples if not sample.num_generated]
        for sample in fresh[:1]:
            sample.followers = fresh[1:]
        going = [sample for sample in samples if sample.waits is None]
        leaders += [sample for sample in going if sample.num_generated or sample is fresh[0]]
    return leaders
