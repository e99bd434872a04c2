"""The paged layout of the CUDA path, with a reference kernel in place of FlashAttention."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from plain_loop import sampled
from rollout_models import assert_same, naive, prompts_of, request, tiny_model
from torch import Tensor

from spmdrl.models.decoder import Decoder
from spmdrl.rollout.native.attention import copy_blocks
from spmdrl.rollout.native.blocks import BlockPool
from spmdrl.rollout.native.cache import CacheShape, layer_caches
from spmdrl.rollout.native.graphs import buckets
from spmdrl.rollout.native.runner import Runner, flatten
from spmdrl.rollout.native.sample import samples_of
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.native.shared_prefix import common_prefix
from spmdrl.rollout.native.step_plan import StepPlan
from spmdrl.rollout.native.varlen import VarlenAttention
from spmdrl.rollout.protocol import Finish
from tiny_model import load_into

BLOCK = 8


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor | None,
    *sizes: int,
    **o: Any,
) -> Tensor:
    """What `varlen_attn` documents for a block table, causal at the lower right."""
    max_query, max_key = sizes
    # FlashAttention 2 reads keys once for a group of heads if a single query has no window
    assert o["window_size"] == ((-1, -1) if max_query == 1 else (-1, 0))
    assert o["scale"] == q.shape[2] ** -0.5
    assert o["enable_gqa"] and o["num_splits"] == 1
    assert key_starts is None or key_starts.diff().tolist() == o["seqused_k"].tolist()
    out = torch.empty_like(q)
    for i, used in enumerate(o["seqused_k"].tolist()):
        a, b = int(starts[i]), int(starts[i + 1])
        assert 0 < b - a <= max_query and used <= max_key
        blocks = o["block_table"][i, : math.ceil(used / BLOCK)].long()
        keys, values = (x[blocks].flatten(0, 1)[:used].transpose(0, 1) for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[0], 0) for x in (keys, values))
        scores = q[a:b].transpose(0, 1) @ keys.mT / math.sqrt(q.shape[2])
        late = torch.arange(used)[None, :] > torch.arange(used - (b - a), used)[:, None]
        weights = scores.masked_fill(late, -torch.inf).softmax(-1)
        out[a:b] = (weights @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_paged_steps_equal_naive_decoding(padded: bool) -> None:
    config, source = tiny_model()
    decoder = Decoder(config, device="cpu")
    load_into(decoder, source)
    prompts = prompts_of(9, 20, 16, 33)
    prompts = [prompts[0][:5] + p for p in prompts]
    asked = [
        request(p, i, 1 + i % 2, max_tokens=12, temperature=0, ignore_eos=True)
        for i, p in enumerate(prompts)
    ]
    groups = [samples_of(r, i, seed=0, step=0) for i, r in enumerate(asked)]
    for group in groups:
        group[0].followers = group[1:]
    scheduler = Scheduler(
        [group[0] for group in groups],
        BlockPool(17),
        block_size=BLOCK,
        max_running=5,
        prefill_tokens=24,
        prefix=common_prefix(prompts),
    )
    shape = CacheShape(
        layers=layer_caches(config, 1),
        num_blocks=17,
        block_size=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    attention = VarlenAttention(shape, max_blocks=7, kernel=reference)
    runner = Runner(decoder, attention, torch.device("cpu"))

    def decode_padded(plan: StepPlan) -> Tensor:
        """A decode step as its CUDA graph computes it: idle rows at the end."""
        tokens, positions, _ = flatten(plan)
        size = next(s for s in buckets(8) if s >= len(tokens))
        copy_blocks(plan.copies, attention.caches())
        attention.prepare(plan, attention.indices(plan, pad_to=size))
        idle = [0] * (size - len(tokens))
        hidden = decoder(torch.tensor(tokens + idle), torch.tensor(positions + idle), attention)
        return (hidden @ decoder.head_weight().T)[: len(tokens)]

    while scheduler.has_work:
        plan = scheduler.plan()
        samples, rows = sampled(plan, scheduler)
        logits = decode_padded(plan) if padded and not plan.chunks else runner.run(plan)[0]
        for sample, row in zip(samples, rows, strict=True):
            sample.logprobs.append(float(logits[row].log_softmax(-1).max()))
            sample.tokens.append(int(logits[row].argmax()))
            if sample.num_generated == 12:
                sample.finish = Finish.LENGTH
                scheduler.finish(sample)
    assert scheduler.num_preempted > 0
    for i, want in enumerate(asked):
        for sample in groups[i]:
            alone = naive(config, source, want, sample.place, seed=0, step=0)
            assert_same(sample.completion(), alone, f"prompt {i}, sample {sample.place}")


def test_graph_sizes_cover_every_batch() -> None:
    for largest in (1, 3, 8, 100, 128, 200, 256):
        sizes = buckets(largest)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == largest
        assert len(sizes) <= 11 and all(b <= max(a + 3, 2 * a) for a, b in pairwise(sizes))
