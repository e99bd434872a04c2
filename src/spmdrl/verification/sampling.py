"""Our engine's tokens, however it schedules, and how they compare with others'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spmdrl.batch import Batch, from_rows
from spmdrl.distributed.parallel import Parallel
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource, fill
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.native.workspace import NativeOptions
from spmdrl.rollout.protocol import Completion, Request, SamplingParams
from spmdrl.rollout.requests import GB
from spmdrl.verification.lines import MARGIN
from spmdrl.verification.texts import Texts

BLOCK = 8
TIGHT = (2, 3, 4, 6, 8, 12, 16, 24)
"""Divisors of a roomy cache, of which the first that makes the engine preempt is taken."""

Found = Sequence[Sequence[Completion]]


def requests_of(texts: Texts) -> list[Request]:
    """Make a greedy request for each prompt, and one whose samples are drawn."""
    greedy = {"temperature": 0.0, "max_tokens": texts.new_tokens, "ignore_eos": True}
    drawn = {**greedy, "temperature": 1.0}
    asked = [(prompt, 1 + (i == 1), greedy) for i, prompt in enumerate(texts.prompts)]
    asked.append((texts.prompts[0], 3, drawn))
    return [
        Request(
            tokens=tokens,
            prompt_id=i,
            samples=tuple(range(samples)),
            sampling=SamplingParams(margins=True, **sampling),
        )
        for i, (tokens, samples, sampling) in enumerate(asked)
    ]


def make_engine(
    model: ModelConfig,
    weights: TensorSource | Mapping[str, Tensor],
    *,
    tp: Parallel | None = None,
    ep: Parallel | None = None,
    **options: Any,
) -> NativeEngine:
    """Make an engine in float32.

    Args:
        weights: where it reads its weights, or those of another engine, which it uses.

    Raises:
        ValueError: the degrees do not fit the model.
    """
    engine = NativeEngine(
        model, tp=tp, ep=ep, options=NativeOptions(**{"block_size": BLOCK, **options})
    )
    if isinstance(weights, Mapping):
        for name, tensor in weights.items():
            engine.adopt(name, tensor)
        return engine
    table = engine.weights.table()
    fill(((engine.allocate(name), held.slices) for name, held in table.items()), weights)
    return engine


def sample(engine: NativeEngine, requests: Sequence[Request]) -> Found:
    """Sample with the verification's seed."""
    return engine.generate(requests, seed=3, step=1)


def sample_tightly(
    model: ModelConfig, engine: NativeEngine, requests: Sequence[Request]
) -> tuple[Found, int]:
    """Sample what `engine` has sampled with prompts in small chunks and so small a cache that
    samples are preempted; return the number of preemptions as well (0 if no cache does that).
    """
    roomy = engine.cache_bytes()
    held = {name: tensor for name, (tensor, _) in engine.local_tensors().items()}
    found: Found = []
    for divisor in TIGHT:
        size = roomy / divisor / GB
        tight = make_engine(model, held, kv_cache_gb=size, prefill_tokens=7)
        try:
            found = sample(tight, requests)
        except ValueError:  # a request by itself needs more
            break
        if tight.num_preempted:
            return found, tight.num_preempted
    return found, 0


def differing(found: Found, wanted: Found) -> float:
    """Count samples that differ from the `wanted`, whose margins say what rounding may change."""
    count = 0
    for group, other in zip(found, wanted, strict=True):
        pairs = zip(group, other, strict=True)
        count += sum(differs(a.tokens, b.tokens, b.margins) for a, b in pairs)
    return float(count)


def differs(found: Sequence[int], wanted: Sequence[int], margins: Sequence[float]) -> bool:
    """Whether tokens part where the margin is at least `MARGIN`."""
    if len(found) != len(wanted):
        return True
    parts = [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
    return bool(parts) and margins[parts[0]] >= MARGIN


def logprob_gap(found: Found, logprobs: Tensor, rows: Batch) -> float:
    """Return the largest difference of the engine's log-probabilities from the trainer's."""
    starts, lengths = rows.offsets()[:-1].tolist(), rows.lengths.tolist()
    worst, number = 0.0, 0
    for group in found:
        for completion in group:
            stop = starts[number] + lengths[number]
            own = logprobs[stop - len(completion.tokens) : stop].tolist()
            gaps = [abs(a - b) for a, b in zip(own, completion.logprobs, strict=True)]
            worst = max(worst, *gaps) if all(map(math.isfinite, gaps)) else math.inf
            number += 1
    return worst


def rows_of(found: Found, requests: Sequence[Request]) -> Batch:
    """Make rows of prompts and what was sampled after them."""
    tokens, prompts = [], []
    for group, request in zip(found, requests, strict=True):
        for completion in group:
            tokens.append([*request.tokens, *completion.tokens])
            prompts.append(len(request.tokens))
    return from_rows(tokens, rows={"prompt_lengths": torch.tensor(prompts)})
