"""`Sequence`: one sample on its way from prompt to completion."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from torch import Tensor

from spmdrl.keyed_random import chain, key64
from spmdrl.rollout.native.supports import SupportRecord
from spmdrl.rollout.protocol import Completion, Finish, Request


@dataclass(kw_only=True, eq=False)
class Sequence:
    """State of one sample.

    Args:
        request: the request that the sample belongs to.
        index: the request's place in the call.
        slot: the sample's place in the request.
        key: random key of (seed, step, prompt id, sample); a token's key adds its position.
        tokens: the prompt's and the generated tokens.
        followers: samples of the same prompt that wait for this one to compute it.
        blocks: cache blocks, in the order of the tokens they hold.
        cached: number of tokens whose keys and values are in the cache.
        rows: rows of an `ExpertRecord`, for the first tokens.
    """

    request: Request
    index: int
    slot: int
    key: int
    tokens: list[int]
    followers: list[Sequence] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    rows: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    support: SupportRecord = field(default_factory=lambda: SupportRecord())
    finish: Finish = "aborted"

    @property
    def prompt_length(self) -> int:
        return len(self.request.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.tokens)

    @property
    def decodes(self) -> bool:
        """Whether only the newest token is not in the cache yet."""
        return self.cached == len(self.tokens) - 1 and self.num_generated > 0

    def next_key(self) -> int:
        """Return the random key of the next token."""
        return chain(self.key, len(self.tokens))

    def begun_experts(self) -> Tensor | None:
        """Return the choices of experts that came with the request, if any."""
        return self.request.begun[self.slot].experts if self.request.begun else None

    def completion(self, experts: Tensor | None = None) -> Completion:
        return Completion(
            tokens=tuple(self.tokens[self.prompt_length :]),
            logprobs=tuple(self.logprobs),
            finish=self.finish,
            margins=tuple(self.margins),
            experts=experts,
            support=self.support.column(self.num_generated)
            if self.request.sampling.support
            else None,
        )


def common_prefix(prompts: Items[tuple[int, ...]]) -> int:
    """Count the tokens with which all prompts begin, below the shortest's length; 0 for one prompt.

    A prompt's last token is not counted, since its row gives the first token of the response.
    """
    if len(prompts) < 2:
        return 0
    # All prompts share a prefix if the smallest and the largest in lexical order do.
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))


def sequences_of(request: Request, index: int, *, seed: int, step: int) -> list[Sequence]:
    """Make the samples of a request, with the tokens that they have drawn before."""
    samples = [
        Sequence(
            request=request,
            index=index,
            slot=slot,
            key=key64(seed, step, request.prompt_id, sample),
            tokens=list(request.tokens),
        )
        for slot, sample in enumerate(request.samples)
    ]
    for sequence, begun in zip(samples, request.begun, strict=False):
        sequence.tokens += begun.tokens
        sequence.logprobs, sequence.margins = list(begun.logprobs), list(begun.margins)
        sequence.finish = begun.finish
        if begun.support is not None:
            sequence.support = SupportRecord.of(begun.support)
    return samples


def leaders_of(groups: Items[Items[Sequence]]) -> list[Sequence]:
    """List the samples with which a scheduler begins: each group's first fresh sample, which
    computes the prompt for the other fresh ones, and each resumed sample; no complete ones.
    """
    leaders = []
    for group in groups:
        samples = [sample for sample in group if sample.finish == "aborted"]
        fresh = [sample for sample in samples if not sample.num_generated]
        for sample in fresh[:1]:
            sample.followers = fresh[1:]
        leaders += [sample for sample in samples if sample.num_generated or sample is fresh[0]]
    return leaders
