"""Windows, soft caps, sinks and latent caches in the engine, against one dense softmax.

Prompts are computed in chunks, the later ones with context; then tokens are decoded one by one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from rollout_models import request
from torch import Tensor

from dense_attention import dense, dense_mask
from spmdrl.models.rope import RopeConfig
from spmdrl.models.spans import Span
from spmdrl.models.specs import (
    AttentionOptions,
    GatedDelta,
    LatentAttention,
    SoftmaxAttention,
)
from spmdrl.rollout.native.attention import GatheredAttention, PagedAttention, copy_blocks
from spmdrl.rollout.native.cache import CacheShape, LayerCache, layer_cache, token_bytes
from spmdrl.rollout.native.paged_decode import CompiledAttention
from spmdrl.rollout.native.sample import Sample, samples_of
from spmdrl.rollout.native.step_plan import Chunk, StepPlan
from spmdrl.rollout.native.varlen import VarlenAttention, pages_are_usable

Inputs = dict[int, list[tuple[Tensor, ...]]]

CPU = torch.device("cpu")
PROMPTS = ((5, 9), (12, 20), (12, 20), (33, 62))
"""Lengths of each prompt's first chunk, and of the prompt."""
DECODED = 5


def layer(options: AttentionOptions, *, latent: bool = False) -> LayerCache:
    if latent:
        return LayerCache(
            heads=4, kv_heads=1, key_width=24, value_width=16, options=options, values_in_keys=True
        )
    return LayerCache(heads=6, kv_heads=2, key_width=16, value_width=16, options=options)


def shape_of(
    layers: Sequence[LayerCache | None], block_size: int, dtype: torch.dtype = torch.float32
) -> CacheShape:
    blocks = sum(-(-(prompt + DECODED) // block_size) for _, prompt in PROMPTS)
    return CacheShape(
        layers=tuple(layers), num_blocks=blocks, block_size=block_size, dtype=dtype, device=CPU
    )


def samples(shape: CacheShape) -> list[Sample]:
    """One for each prompt, with blocks in random order."""
    free = list(range(shape.num_blocks))
    random.Random(0).shuffle(free)
    made = []
    for i, (_, prompt) in enumerate(PROMPTS):
        (one,) = samples_of(request(tuple(range(prompt + DECODED)), i), i, seed=0, step=0)
        one.blocks = [free.pop() for _ in range(-(-(prompt + DECODED) // shape.block_size))]
        made.append(one)
    return made


STEPS: list[tuple[list[tuple[int, int]], list[tuple[int, int, int]]]] = [
    ([], [(i, 0, first) for i, (first, _) in enumerate(PROMPTS)]),
    ([], [(i, *PROMPTS[i]) for i in (0, 1, 2)]),
    ([(0, PROMPTS[0][1])], [(3, *PROMPTS[3])]),
    *[([(i, PROMPTS[i][1] + n + (i == 0)) for i in range(4)], []) for n in range(DECODED - 1)],
]
"""The (sample, place) of each step's decodes, and the (sample, start, stop) of its chunks."""


def outputs(
    attention: PagedAttention, shape: CacheShape, inputs: Inputs, sinks: Tensor | None
) -> list[list[Tensor]]:
    """Every layer's rows, step by step."""
    made, found = samples(shape), []
    for decodes, chunks in STEPS:
        for i, place in decodes:
            made[i].cached = place + 1
        plan = StepPlan(
            copies=[],
            decodes=[made[i] for i, _ in decodes],
            chunks=[Chunk(sample=made[i], start=a, stop=b) for i, a, b in chunks],
        )
        attention.prepare(plan, attention.indices(plan))
        rows = [(i, place, place + 1) for i, place in decodes] + chunks
        step = []
        for number, sizes in shape.cached():
            parts = [[x[a:b] for x in inputs[number][i]] for i, a, b in rows]
            q, k, v = (torch.cat(x).to(shape.dtype) for x in zip(*parts, strict=True))
            given = None if sinks is None else sinks[: sizes.heads]
            step.append(attention(number, q, k, v, given))
        found.append(step)
    return found


def draw(shape: CacheShape) -> Inputs:
    """Each layer's q, k, v of each sample."""
    drawn = torch.Generator().manual_seed(1)
    inputs: Inputs = {}
    for number, sizes in shape.cached():
        inputs[number] = []
        for _, prompt in PROMPTS:
            length = prompt + DECODED
            q = 2 * torch.randn(length, sizes.heads, sizes.key_width, generator=drawn)
            k, v = torch.randn(2, length, sizes.kv_heads, sizes.key_width, generator=drawn)
            if sizes.values_in_keys:
                v = k[..., : sizes.value_width]
            inputs[number].append(tuple(x.to(shape.dtype).float() for x in (q, k, v)))
    return inputs


def check(
    attention: PagedAttention, shape: CacheShape, *, with_sinks: bool, tolerance: float
) -> None:
    inputs, sinks = draw(shape), torch.linspace(-1, 2, 6) if with_sinks else None
    found = outputs(attention, shape, inputs, sinks)
    for at, (number, sizes) in enumerate(shape.cached()):
        wanted = []
        for q, k, v in inputs[number]:
            spans = [Span(q_start=0, q_stop=len(q), own=(0, len(q)))]
            mask = dense_mask(spans, len(q), sizes.options.window)
            given = None if sinks is None else sinks[: sizes.heads].double()
            wide = (q.double(), k.double(), v.double())
            wanted.append(dense(*wide, mask, sizes.options, given).float())
        for (decodes, chunks), step in zip(STEPS, found, strict=True):
            rows = [(i, place, place + 1) for i, place in decodes] + chunks
            expected = torch.cat([wanted[i][a:b] for i, a, b in rows])
            torch.testing.assert_close(
                step[at].float(), expected, rtol=tolerance, atol=tolerance, msg=f"{sizes} {rows}"
            )


OPTIONS = [
    AttentionOptions(scale=0.2, window=window, softcap=softcap)
    for window, softcap in product((None, 1, 6, 16, 200), (None, 1.5, 20.0))
]


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("make", [GatheredAttention, CompiledAttention])
def test_the_cpu_attends_as_the_definition_says(
    make: Callable[[CacheShape], PagedAttention], block_size: int, with_sinks: bool
) -> None:
    """Layers of every option in one cache, with a latent one and one without a cache."""
    layers = [layer(options) for options in OPTIONS]
    layers += [layer(options, latent=True) for options in OPTIONS[::4]]
    shape = shape_of([*layers[:2], None, *layers[2:]], block_size)
    attention = make(shape)
    check(attention, shape, with_sinks=with_sinks, tolerance=2e-5)


def test_bfloat16_is_close() -> None:
    shape = shape_of([layer(options) for options in OPTIONS], 8, torch.bfloat16)
    check(GatheredAttention(shape), shape, with_sinks=True, tolerance=2e-2)


def paged(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *_: Any, **o: Any) -> Any:
    """Stand for torch's kernel: windows by numbers of keys, and the logarithms of sums."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i, used in enumerate(o["seqused_k"].tolist()):
        rows = slice(*starts[i : i + 2].tolist())
        count = rows.stop - rows.start
        keys, values = (x[o["block_table"][i].long()].flatten(0, 1)[:used] for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * o["scale"]
        left, right = o["window_size"]
        place = torch.arange(used - count, used)[:, None]
        key = torch.arange(used)
        seen = (key <= place + right) if right >= 0 else torch.ones(count, used, dtype=torch.bool)
        if left >= 0:
            seen &= key >= place - left
        scores = scores.masked_fill(~seen, -torch.inf)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return (out, lse) if "return_aux" in o else out


@pytest.mark.parametrize("with_sinks", [False, True])
def test_pages_attend_as_the_definition_says(with_sinks: bool) -> None:
    layers = [layer(options) for options in OPTIONS if options.softcap is None]
    shape = shape_of([*layers, None], 8)
    attention = VarlenAttention(shape, max_blocks=9, kernel=paged)
    check(attention, shape, with_sinks=with_sinks, tolerance=2e-5)


def test_only_blocks_inside_the_window_are_read() -> None:
    """Others may hold anything: here what makes every result NaN."""
    layers = [layer(AttentionOptions(scale=0.2, window=6)) for _ in range(2)]
    for make in (GatheredAttention, CompiledAttention):
        shape = shape_of(layers, 4)
        attention, inputs = make(shape), draw(shape)
        outputs(attention, shape, inputs, None)
        (one,) = samples(shape)[3:]
        one.cached = PROMPTS[3][1] + 3
        for cache in attention.caches():
            for block in one.blocks[: (one.cached - 6) // 4]:
                cache[block] = torch.nan
        plan = StepPlan(copies=[], decodes=[one], chunks=[])
        attention.prepare(plan, attention.indices(plan))
        row = [x[one.cached - 1 : one.cached] for x in inputs[0][3]]
        assert attention(0, *row).isfinite().all()
        plan = StepPlan(copies=[], decodes=[], chunks=[Chunk(sample=one, start=62, stop=65)])
        attention.prepare(plan, attention.indices(plan))
        assert attention(0, *(x[62:65] for x in inputs[0][3])).isfinite().all()


def test_bytes_are_those_of_every_layer() -> None:
    plain, latent = (layer(OPTIONS[0], latent=is_latent) for is_latent in (False, True))
    assert token_bytes([plain, None, latent], torch.float32) == 4 * (2 * 2 * 16 + 24)
    shape = shape_of([plain, None, latent], 4)
    caches = GatheredAttention(shape).caches()
    assert sum(cache.nbytes for cache in caches) == shape.num_bytes
    # the latent layer has no values of its own
    assert len(caches) == 3
    copy_blocks([(1, 0)], caches)
    assert all(torch.equal(cache[0], cache[1]) for cache in caches)


def test_layers_keep_what_their_mixers_need() -> None:
    rope, options = RopeConfig(theta=1e4), OPTIONS[0]
    softmax = SoftmaxAttention(num_heads=8, num_kv_heads=2, head_dim=16, rope=rope, options=options)
    latent = LatentAttention(
        num_heads=8,
        q_rank=None,
        kv_rank=32,
        nope_dim=16,
        rope_dim=8,
        v_dim=12,
        rope=rope,
        options=options,
    )
    delta = GatedDelta(num_heads=2, num_v_heads=4, head_dim=8, v_dim=8, conv_size=4)
    assert layer_cache(delta, 2) is None
    found = [layer_cache(mixer, 4) for mixer in (softmax, latent)]
    assert found == [
        LayerCache(heads=2, kv_heads=1, key_width=16, value_width=16, options=options),
        LayerCache(
            heads=2, kv_heads=1, key_width=40, value_width=32, options=options, values_in_keys=True
        ),
    ]


def test_pages_are_refused_where_the_kernel_lacks_an_option() -> None:
    cuda, half = torch.device("cuda"), torch.bfloat16
    wide = {"capability": (9, 0)}
    windows = [None, *(layer(AttentionOptions(scale=1.0, window=w)) for w in (None, 8))]
    assert pages_are_usable(windows, half, cuda, **wide)
    assert not pages_are_usable(windows, half, CPU)
    for one in (layer(OPTIONS[1]), layer(OPTIONS[0], latent=True)):
        assert not pages_are_usable([*windows, one], half, cuda, **wide)
