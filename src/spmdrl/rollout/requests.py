"""Cache blocks that the requests of a call need, and checks for requests that never fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from spmdrl.models.config import ModelConfig
from spmdrl.rollout.protocol import OWN, Request, SamplingParams

GB = 10**9


def blocks_needed(requests: Sequence[Request], block_size: int, max_running: int) -> int:
    """Count the blocks that the largest `max_running` samples need to finish side by side."""
    needs = (
        -(-(len(request.tokens) + request.longest) // block_size)
        for request in requests
        for _ in request.samples
    )
    return sum(sorted(needs, reverse=True)[:max_running])


def scoring_requests(
    sequences: Sequence[tuple[int, ...]],
    adapters: Sequence[str | None] | None,
    sampling: SamplingParams,
) -> list[Request]:
    """Make the requests of `RolloutEngine.score`, one per sequence."""
    asked = [OWN] * len(sequences) if adapters is None else adapters
    return [
        Request(tokens=tokens, prompt_id=i, samples=(0,), sampling=sampling, adapter=adapter)
        for i, (tokens, adapter) in enumerate(zip(sequences, asked, strict=True))
    ]


def check_requests(
    requests: Sequence[Request],
    model: ModelConfig,
    *,
    capacity: int,
    fix: str,
    has_text: bool,
    generates: bool = True,
    adapters: Collection[str] = (),
) -> None:
    """Raise ValueError if a request can never be served, naming the first one and the reason.

    Args:
        capacity: tokens that the key-value cache holds.
        fix: text for messages, how to make the cache larger.
        has_text: whether the engine can turn tokens into text.
        generates: False if the requests' tokens are only scored, and none are added.
        adapters: names of those that the engine holds apart from its weights.
    """
    for i, request in enumerate(requests):
        name = f"request {i} (prompt_id {request.prompt_id})"
        tokens = request.tokens
        if not tokens:
            raise ValueError(f"{name} has an empty prompt")
        if min(tokens) < 0 or max(tokens) >= model.vocab_size:
            raise ValueError(f"{name} has token ids outside the vocabulary of {model.vocab_size}")
        total, asked = len(tokens), f"{name}: {len(tokens)} tokens"
        if generates:
            total += request.longest
            limit = f"sampling.max_tokens={request.longest}"
            if request.room:
                limit = f"{request.room} tokens of turns"
            asked = f"{name}: {len(tokens)} prompt tokens and {limit}"
        if total > model.max_position:
            has = model.describe_positions()
            raise ValueError(f"{asked} need {total} positions, the model has {has}")
        if total > capacity:
            raise ValueError(
                f"{asked} need {total} cache slots, the key-value cache has {capacity}: {fix}"
            )
        if request.sampling.experts and model.moe is None:
            raise ValueError(f"{name} asks for its experts, but {model.architecture} has none")
        if request.sampling.stop and not has_text:
            raise ValueError(f"{name} has stop texts, but the engine cannot detokenize")
        if request.adapter is None and OWN not in adapters:
            raise ValueError(
                f"{name} asks for the base alone, but the engine holds no adapter apart from it: "
                "give the policy one (roles.NAME.adapter) and set rollout.engine=native, "
                "rollout.adapters=unmerged"
            )
        if request.adapter not in (None, OWN, *adapters):
            raise ValueError(
                f"{name} asks for adapter {request.adapter!r}, which was not added to the engine"
            )
