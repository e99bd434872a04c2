"""Turns by rounds, for engines that cannot continue a sample: one turn of all open samples, then
their answers, and so on. A turn is a request of its own, whose prompt is the context so far.

Between rounds the engine waits for the slowest answer. Random numbers of a turn are those of its
request, so they are not those of an engine that continues a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from spmdrl.batch import Ragged
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.protocol import (
    Answer,
    Completion,
    Ending,
    Finish,
    Progress,
    Request,
    Turn,
    Turns,
)
from spmdrl.rollout.turn_messages import answers_of, written

_WAIT_S = 0.05
"""Seconds that the leader waits for an answer before it looks for a request to stop."""

Draw = Callable[[Sequence[Request], Sequence[int], Progress], list[list[Completion]]]
"""Draws requests without turns, given the number of turns that were before each, which its random
numbers depend on. Ranks in lockstep draw the same, and are stopped together."""


@dataclass(kw_only=True, eq=False)
class _Sample:
    """A sample between its turns; `tokens` and what belongs to them begin after the prompt."""

    request: Request
    index: int
    number: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    support: list[int] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    waits: Finish | None = None
    ending: Ending | None = None

    @property
    def start(self) -> int:
        """Place at which its turn begins."""
        return self.given[-1][1] if self.given else 0

    @property
    def is_open(self) -> bool:
        return self.ending is None

    def asked(self) -> Request:
        """Return the request for its turn."""
        prompt = () if self.parts else self.request.tokens
        sampling = self.request.sampling.model_copy(update={"max_tokens": self.limit})
        return replace(
            self.request,
            tokens=(*prompt, *self.tokens[self.parts[-1] if self.parts else 0 :]),
            samples=(self.number,),
            sampling=sampling,
            begun=(),
            room=0,
        )

    def add(self, turn: Completion) -> None:
        """Add tokens that were drawn."""
        self.tokens += turn.tokens
        self.logprobs += turn.logprobs
        self.margins += turn.margins
        if turn.support is not None:
            self.counts += turn.support.counts.tolist()
            self.support += turn.support.values.tolist()

    def give(self, answer: Answer) -> None:
        """Continue with tokens that are given, or end, or start again."""
        self.waits = None
        if answer.restarts:
            self.keep(0)
            self.given, self.parts, self.rewards = [], [], []
            self.limit = self.request.sampling.max_tokens
            return
        self.rewards.append(answer.reward)
        if answer.max_tokens == 0:
            self.ending = answer.ending
            return
        first, count = len(self.tokens), len(answer.tokens)
        assert 0 < count <= self.request.longest - first - answer.max_tokens, answer
        self.given.append((first, first + count))
        self.parts += [first] * answer.begins_part
        self.tokens += answer.tokens
        self.logprobs += [0.0] * count
        if self.request.sampling.margins:
            self.margins += [0.0] * count
        if self.request.sampling.support:
            self.counts += [0] * count
        self.limit = answer.max_tokens

    def keep(self, count: int) -> None:
        """Drop all tokens but the first `count`."""
        del self.tokens[count:], self.logprobs[count:], self.margins[count:]
        del self.counts[count:], self.support[sum(self.counts) :]

    def completion(self) -> Completion:
        support = None
        if self.request.sampling.support:
            counts = torch.tensor(self.counts, dtype=torch.int32)
            values = torch.tensor(self.support, dtype=torch.int32)
            support = Ragged(counts=counts, values=values)
        return Completion(
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish=Finish.ABORTED if self.ending is None else self.ending.finish,
            margins=tuple(self.margins),
            support=support,
            given=tuple(self.given),
            parts=tuple(self.parts),
            waits=self.waits,
            turn_limit=self.limit if self.is_open else None,
            rewards=tuple(self.rewards),
            ending=self.ending,
        )


def by_rounds(
    draw: Draw,
    requests: Sequence[Request],
    turns: Turns,
    group: Lockstep,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[list[Completion]]:
    """Generate completions of samples that take turns; see `RolloutEngine.generate`.

    A turn that is stopped is drawn again when the call resumes; turns before it are kept.

    Args:
        turns: answers, on the group's leader.
        group: the ranks that draw in lockstep.
    """
    groups = [_samples_of(request, i) for i, request in enumerate(requests)]
    samples = [sample for group in groups for sample in group if sample is not None]
    rounds = _Rounds(draw, samples, turns, group, progress, should_stop)
    rounds.run()
    return [
        [request.begun[place] if s is None else s.completion() for place, s in enumerate(found)]
        for request, found in zip(requests, groups, strict=True)
    ]


class _Rounds:
    """The rounds of one call."""

    def __init__(
        self,
        draw: Draw,
        samples: Sequence[_Sample],
        turns: Turns,
        group: Lockstep,
        progress: Progress | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self._draw, self._samples, self._turns, self._group = draw, samples, turns, group
        self._progress, self._should_stop = progress, should_stop
        self._by_place = {(s.index, s.number): s for s in samples}
        self._num_tokens = 0

    def run(self) -> None:
        """Run rounds until all samples have ended, or are stopped."""
        for sample in self._samples:
            if sample.waits is not None:
                self._tell(sample)
        while any(sample.is_open for sample in self._samples):
            if self._turn() or self._answers():
                return

    def _turn(self) -> bool:
        """Draw a turn of each sample that does not wait; returns whether it was stopped."""
        drawing = [s for s in self._samples if s.is_open and s.waits is None]
        if not drawing:  # a call that resumes while all wait
            return False
        asked: list[tuple[Request, list[_Sample]]] = []
        for (_, is_first), found in groupby(drawing, key=lambda s: (s.index, not s.given)):
            own = list(found)
            if is_first:  # they share the prompt
                numbers = tuple(sample.number for sample in own)
                asked.append((replace(own[0].asked(), samples=numbers), own))
            else:
                asked += [(sample.asked(), [sample]) for sample in own]
        before = [len(own[0].given) for _, own in asked]
        drawn = self._draw([request for request, _ in asked], before, self._report)
        stopped = False
        for (_, own), completions in zip(asked, drawn, strict=True):
            for sample, turn in zip(own, completions, strict=True):
                if turn.finish is Finish.ABORTED:
                    stopped = True
                    continue
                sample.add(turn)
                sample.waits = turn.finish
                self._num_tokens += len(turn.tokens)
                self._tell(sample)
        return stopped

    def _answers(self) -> bool:
        """Wait for the answers to all turns; returns whether the call was stopped before."""
        while any(sample.waits is not None for sample in self._samples):
            is_leader = self._group.is_leader
            arrived = written(self._turns.answers(_WAIT_S)) if is_leader else []
            stop = is_leader and self._should_stop is not None and self._should_stop()
            stopped, length = self._group.from_leader([int(stop), len(arrived)])
            if length:
                for answer in answers_of(self._group.from_leader(arrived or [0] * length)):
                    self._by_place[answer.request, answer.sample].give(answer)
            self._report(0, 0)
            if stopped:
                return True
        return False

    def _tell(self, sample: _Sample) -> None:
        if not self._group.is_leader:
            return
        assert sample.waits is not None
        turn = Turn(
            request=sample.index,
            sample=sample.number,
            number=len(sample.given),
            tokens=tuple(sample.tokens[sample.start :]),
            finish=sample.waits,
        )
        self._turns.ended(turn)

    def _report(self, num_tokens: int, _: int) -> None:
        if self._progress is not None:
            num_done = sum(not sample.is_open for sample in self._samples)
            self._progress(self._num_tokens + num_tokens, num_done)


def _samples_of(request: Request, index: int) -> list[_Sample | None]:
    """Make the samples of a request; None for those that were complete before."""
    return [
        None if request.done(place) is not None else _begun(request, index, place, number)
        for place, number in enumerate(request.samples)
    ]


def _begun(request: Request, index: int, place: int, number: int) -> _Sample:
    limit = request.sampling.max_tokens
    sample = _Sample(request=request, index=index, number=number, limit=limit)
    if request.begun:
        begun = request.begun[place]
        sample.add(begun)
        sample.given, sample.parts = list(begun.given), list(begun.parts)
        sample.rewards = list(begun.rewards)
        sample.limit, sample.waits = begun.turn_limit or limit, begun.waits
        if begun.waits is None:
            sample.keep(sample.start)
    return sample
