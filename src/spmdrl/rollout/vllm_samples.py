"""Samples on their way through vLLM, one engine step after another. Nothing here imports vLLM."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from spmdrl.batch import Ragged
from spmdrl.rollout.lockstep import Lockstep
from spmdrl.rollout.protocol import Completion, Finish, Progress, Request
from spmdrl.rollout.stops import StopRule, StopRules


@dataclass(kw_only=True, eq=False)
class VllmSample:
    """One sample; `tokens` begins with the prompt."""

    request: Request
    rule: StopRule
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    support: list[list[int]] = field(default_factory=list)
    finish: Finish = Finish.ABORTED

    def completion(self) -> Completion:
        tokens = tuple(self.tokens[len(self.request.tokens) :])
        return Completion(
            tokens=tokens,
            logprobs=tuple(self.logprobs),
            finish=self.finish,
            support=self._supports() if self.request.sampling.support else None,
        )

    def _supports(self) -> Ragged:
        ids = [token for ids in self.support for token in ids]
        return Ragged(
            counts=torch.tensor([len(ids) for ids in self.support], dtype=torch.int32),
            values=torch.tensor(ids, dtype=torch.int32),
        )


def samples_of(requests: Sequence[Request], stops: StopRules) -> list[list[VllmSample]]:
    """Make the samples of each request, with nothing generated yet."""
    return [
        [
            VllmSample(
                request=request,
                rule=stops.of(request.sampling),
                tokens=list(request.tokens),
            )
            for _ in request.samples
        ]
        for request in requests
    ]


def completions_of(
    requests: Sequence[Request], groups: Sequence[Sequence[VllmSample]]
) -> list[list[Completion]]:
    """Return completions by request, those that came with them included."""
    return [
        [request.done(place) or sample.completion() for place, sample in enumerate(group)]
        for request, group in zip(requests, groups, strict=True)
    ]


def agreed_stop(group: Lockstep, should_stop: Callable[[], bool] | None) -> Callable[[], bool]:
    """Return a function that asks the leader whether to stop, by the group's message of a step."""

    def stops() -> bool:
        if should_stop is None:
            return False
        [stop] = group.from_leader([int(group.is_leader and should_stop())])
        return bool(stop)

    return stops


def check_alike(group: Lockstep, completions: Sequence[Sequence[Completion]]) -> None:
    """Check by one message that the ranks of the group, which all drew their tokens, agree."""
    drawn = repr([[c.tokens for c in found] for found in completions])
    own = zlib.crc32(drawn.encode())
    if group.from_leader([own]) != [own]:
        raise RuntimeError(
            f"rank {dist.get_rank()} drew other tokens than the first rank of its "
            "tensor-parallel group: vLLM's ranks do not compute the same logits, bit for bit"
        )


def run_steps(
    engine: Any,
    waiting: dict[str, VllmSample],
    progress: Progress | None,
    should_stop: Callable[[], bool],
) -> None:
    """Run engine steps until every sample has ended, or `should_stop` returns True.

    Args:
        engine: vLLM's engine, which holds only the samples' requests; afterwards it holds none.
        waiting: samples by request id; open samples stay in it.
        should_stop: callback in every step, with equal results on all ranks of the group.
    """
    tokens_done = samples_done = 0
    try:
        while waiting:
            outputs = engine.step()
            stop = should_stop()
            unknown: list[str] = []  # samples that ended with a stop text, unknown to vLLM
            for output in outputs:
                sample = waiting[output.request_id]
                tokens_done += _extend(sample, output)
                if sample.finish is not Finish.ABORTED:
                    samples_done += 1
                    del waiting[output.request_id]
                    unknown += [] if output.finished else [output.request_id]
            if unknown:
                engine.abort_request(unknown)
            if progress is not None:
                progress(tokens_done, samples_done)
            if stop:
                break
    finally:
        if waiting:
            engine.abort_request(list(waiting))


def _extend(sample: VllmSample, output: Any) -> int:
    """Add the tokens that a step drew for the sample, up to its end; return their number."""
    [piece] = output.outputs
    count = 0
    for token, found in zip(piece.token_ids, piece.logprobs, strict=True):
        logprob = found[token].logprob
        if logprob != logprob:
            raise ValueError(
                f"the logits of prompt {sample.request.prompt_id} are not finite: the policy's "
                "weights hold NaN or infinity, or a weight sync has never brought any"
            )
        sample.tokens.append(token)
        if sample.request.sampling.support:
            ids, mass = support_of(found)
            sample.support.append(ids)
            logprob -= mass
        sample.logprobs.append(logprob)
        count += 1
        finish = sample.rule.check(sample.tokens, len(sample.logprobs))
        if finish is not None:
            sample.finish = finish
            break
    assert not output.finished or sample.finish is not Finish.ABORTED, piece.finish_reason
    return count


def support_of(found: Mapping[int, Any]) -> tuple[list[int], float]:
    """Return the tokens that one was drawn from, and the logarithm of their mass.

    The mass is 1, unless more tokens tie with the last of vLLM's top-k than it was asked for; the
    draw is then taken as one from the tokens that it reported.

    Args:
        found: the most likely tokens and the drawn one; those that cannot be drawn have -inf.
    """
    kept = {token: entry.logprob for token, entry in found.items() if entry.logprob > -math.inf}
    return sorted(kept), math.log(math.fsum(math.exp(value) for value in kept.values()))


def run_scores(
    engine: Any, waiting: dict[str, int], sequences: Sequence[Sequence[int]]
) -> dict[int, list[float]]:
    """Run engine steps until all sequences are scored; return log-probabilities by sequence.

    Args:
        waiting: index of the sequence by request id; a sequence's first token has no score.
    """
    scores: dict[int, list[float]] = {}
    while waiting:
        for output in engine.step():
            number = waiting[output.request_id]
            if output.prompt_logprobs:
                pairs = zip(sequences[number][1:], output.prompt_logprobs[1:], strict=True)
                scores[number] = [found[token].logprob for token, found in pairs]
            if output.finished:
                del waiting[output.request_id]
    return scores
