"""The compiled attention equals the one in torch's operations, for any shape and any blocks."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from rollout_models import request
from torch import Tensor

from spmdrl.models.specs import AttentionOptions
from spmdrl.rollout.native.attention import GatheredAttention, PagedAttention
from spmdrl.rollout.native.cache import CacheShape, LayerCache
from spmdrl.rollout.native.paged_decode import (
    CompiledAttention,
    compiled_code,
    has_compiled_code,
)
from spmdrl.rollout.native.sample import Sample, samples_of
from spmdrl.rollout.native.step_plan import Chunk, StepPlan

LENGTHS = (1, 7, 32, 33, 64, 95)


def layer_of(head_dim: int, group: int, kv_heads: int = 2) -> LayerCache:
    return LayerCache(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        key_width=head_dim,
        value_width=head_dim,
        options=AttentionOptions(scale=head_dim**-0.5),
    )


def shape_of(head_dim: int, group: int, block_size: int) -> CacheShape:
    return CacheShape(
        layers=(layer_of(head_dim, group),) * 2,
        num_blocks=sum(-(-n // block_size) for n in LENGTHS),
        block_size=block_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def samples(shape: CacheShape, *, dense: bool) -> list[Sample]:
    """One for each length, with the blocks of the pool dealt out in order or not."""
    blocks = list(range(shape.num_blocks))
    if not dense:
        random.Random(0).shuffle(blocks)
    made = []
    for i, length in enumerate(LENGTHS):
        (one,) = samples_of(request(tuple(range(length)), i), i, seed=0, step=0)
        one.blocks = [blocks.pop(0) for _ in range(-(-length // shape.block_size))]
        made.append(one)
    return made


def outputs(attention: PagedAttention, shape: CacheShape, *, dense: bool) -> Tensor:
    """Of both layers: all tokens computed as prompts, then the last ones again as decodes."""
    drawn = torch.Generator().manual_seed(1)
    made, out = samples(shape, dense=dense), []
    for one in made:
        one.cached = len(one.tokens)
    chunks = [Chunk(sample=s, start=0, stop=len(s.tokens)) for s in made]
    steps = (
        (StepPlan(copies=[], decodes=[], chunks=chunks), sum(LENGTHS)),
        (StepPlan(copies=[], decodes=made, chunks=[]), len(LENGTHS)),
    )
    for plan, rows in steps:
        attention.prepare(plan, attention.indices(plan))
        for layer, sizes in shape.cached():
            heads = [sizes.heads, sizes.kv_heads, sizes.kv_heads]
            qkv = torch.randn(rows, sum(heads), sizes.key_width, generator=drawn)
            q, k, v = qkv.split(heads, dim=1)
            out.append(attention(layer, q, k, v).flatten())
    return torch.cat(out)


@pytest.mark.parametrize("head_dim", [4, 24, 64, 128])
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("block_size", [4, 32, 80])
def test_it_is_the_attention_of_torchs_operations(
    head_dim: int, group: int, block_size: int
) -> None:
    shape = shape_of(head_dim, group, block_size)
    plain = outputs(GatheredAttention(shape), shape, dense=True)
    for dense in (True, False):
        found = outputs(CompiledAttention(shape), shape, dense=dense)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=2e-6)


def prepare_decodes(attention: PagedAttention, decodes: list[Sample]) -> None:
    plan = StepPlan(copies=[], decodes=decodes, chunks=[])
    attention.prepare(plan, attention.indices(plan))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_is_the_same_whatever_is_served_with_it(threads: int) -> None:
    shape = shape_of(64, 3, 32)
    attention = CompiledAttention(shape)
    outputs(attention, shape, dense=False)
    made = samples(shape, dense=False)
    for one in made:
        one.cached = len(one.tokens)
    q = torch.randn(len(made), 6, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prepare_decodes(attention, made)
        together = attention._attend_decodes(1, q)
        for i, one in enumerate(made):
            prepare_decodes(attention, [one])
            assert torch.equal(attention._attend_decodes(1, q[i : i + 1])[0], together[i])
    finally:
        torch.set_num_threads(before)


def test_large_scores_and_not_finite_ones() -> None:
    shape = shape_of(8, 2, 8)
    attention = CompiledAttention(shape)
    outputs(attention, shape, dense=True)
    (one,) = samples(shape, dense=True)[4:5]
    one.cached = len(one.tokens)
    prepare_decodes(attention, [one])
    q = torch.zeros(1, 4, 8)
    q[0, :2] = 1e4  # scores of thousands: e^score alone would be infinite
    q[0, 3, 5] = torch.nan
    out = attention._attend_decodes(0, q)[0]
    assert out[:3].isfinite().all() and out[3].isnan().all()
    keys, _, values, _ = attention.caches()
    mean = torch.cat([values[b, 1] for b in one.blocks])[:64].mean(0)
    torch.testing.assert_close(out[2], mean, rtol=1e-5, atol=1e-6)  # q of zeros: all alike
    found = torch.cat([keys[b, 0] for b in one.blocks], dim=1)[:, :64]
    best = int((q[0, 0] @ found).argmax())
    block, place = one.blocks[best // 8], best % 8
    torch.testing.assert_close(out[0], values[block, 0, place])


def test_other_shapes_and_dtypes_have_none() -> None:
    shape, layer = shape_of(64, 3, 32), layer_of(64, 3)
    assert compiled_code(layer, shape) is not None and has_compiled_code(shape)
    half = dataclasses.replace(shape, dtype=torch.bfloat16)
    others = (
        (layer, half),
        (layer_of(6, 3), shape),
        (layer, dataclasses.replace(shape, block_size=1)),
        (layer, dataclasses.replace(shape, block_size=1 << 16)),
        (dataclasses.replace(layer, value_width=32), shape),
        (dataclasses.replace(layer, value_width=32, values_in_keys=True), shape),
    )
    assert [compiled_code(*other) for other in others] == [None] * 6
    assert not has_compiled_code(half)
    with pytest.raises(ValueError, match="no compiled attention"):
        CompiledAttention(half)
