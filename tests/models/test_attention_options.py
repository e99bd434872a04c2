"""Windows, soft caps, sinks, scales and widths of values against one dense softmax."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from dense_attention import dense, dense_mask, random_spans, shared_prompt
from spmdrl.models.attention import (
    AttentionKernel,
    AttentionKind,
    PackedAttention,
    make_kernel,
    resolve_attention,
)
from spmdrl.models.attention_flex import make_block_mask
from spmdrl.models.attention_pieces import cut
from spmdrl.models.layer_attention import AttentionNeeds
from spmdrl.models.spans import Span
from spmdrl.models.specs import AttentionOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, WIDTH = 4, 8


def inputs(
    spans: list[Span], num_keys: int, kv_heads: int, v_width: int, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """q, k, v and sinks as leaves, and the output's gradient."""
    drawn = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64)

    leaves = [
        draw(spans[-1].q_stop, HEADS, WIDTH),
        draw(num_keys, kv_heads, WIDTH),
        draw(num_keys, kv_heads, v_width),
        draw(HEADS),
    ]
    return [x.requires_grad_() for x in leaves], draw(spans[-1].q_stop, HEADS, v_width)


def check(
    kernel: AttentionKernel,
    spans: list[Span],
    num_keys: int,
    options: AttentionOptions,
    *,
    with_sinks: bool,
    kv_heads: int = 2,
    v_width: int = WIDTH,
) -> None:
    (q, k, v, sinks), grad = inputs(spans, num_keys, kv_heads, v_width)
    given = sinks if with_sinks else None
    leaves = (q, k, v, sinks) if with_sinks else (q, k, v)
    expected = dense(q, k, v, dense_mask(spans, num_keys, options.window), options, given)
    attend = PackedAttention(spans, kernel, options=[options], dtype=torch.float64, device=CPU)
    found = attend(0, q, k, v, given)
    case = str((spans, options, with_sinks, kv_heads, v_width))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=case)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=case)


@pytest.mark.parametrize("kind", ["blocked", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 3, 30, 90, 1000])
def test_kernels_equal_dense_attention(kind: AttentionKind, window: int | None) -> None:
    kernel, random = make_kernel(kind), Random(window or 0)
    cases = [random_spans(random, 12), random_spans(random, 150)]
    cases.append((shared_prompt(0, 20, [3, 1, 70, 4, 4]) + shared_prompt(102, 5, [2, 2]), 111))
    for (spans, num_keys), softcap, sinks in product(cases, (None, 0.7), (False, True)):
        options = AttentionOptions(scale=random.choice([1.0, 0.3]), window=window, softcap=softcap)
        widths = {"kv_heads": random.choice([1, 2, 4]), "v_width": random.choice([WIDTH, 5, 12])}
        check(kernel, spans, num_keys, options, with_sinks=sinks, **widths)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("window", [None, 3, 30])
def test_flex_equals_dense_attention(window: int | None) -> None:
    spans, num_keys = random_spans(Random(1), 40)
    (q, k, v, sinks), _ = inputs(spans, num_keys, 2, 16)
    mask = dense_mask(spans, num_keys, window)
    for softcap, given in product((None, 0.7), (None, sinks.detach())):
        options = AttentionOptions(scale=0.5, window=window, softcap=softcap)
        function = make_kernel("flex").prepare(spans, options, dtype=torch.float64, device=CPU)
        found = function(q.detach(), k.detach(), v.detach(), given)
        expected = dense(q, k, v, mask, options, given)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 30, 200, 1000])
def test_blocks_of_flex_are_those_of_the_whole_mask(window: int | None) -> None:
    random = Random(3)
    cases = [random_spans(random, 700), random_spans(random, 1), random_spans(random, 256)]
    cases.append((shared_prompt(0, 400, [300, 1, 70, 4, 4]) + shared_prompt(779, 5, [2, 2]), 788))
    for spans, _ in cases:
        found = make_block_mask(spans, window, CPU)
        expected = create_block_mask(found.mask_mod, None, None, *found.seq_lengths, device="cpu")
        assert found.seq_lengths == (spans[-1].q_stop, sum(span.num_keys for span in spans))
        names = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
        for name in names:
            assert torch.equal(getattr(found, name), getattr(expected, name)), (name, spans)
        assert torch.equal(found.to_dense(), expected.to_dense()), spans


def test_half_precision_is_rounded_once() -> None:
    """Soft caps and sinks in bfloat16 are computed in float32."""
    spans, num_keys = random_spans(Random(2), 100)
    (q, k, v, sinks), grad = inputs(spans, num_keys, 2, WIDTH)
    options = AttentionOptions(scale=0.5, window=20, softcap=2.0)
    q, k, v, sinks = (x.detach().bfloat16().requires_grad_() for x in (q, k, v, sinks))
    kernel = make_kernel("sdpa")
    attend = PackedAttention(spans, kernel, options=[options], dtype=torch.bfloat16, device=CPU)
    found = attend(0, q, k, v, sinks)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    expected = dense(*wide[:3], dense_mask(spans, num_keys, 20), options, wide[3])
    grads = torch.autograd.grad(found, (q, k, v, sinks), grad.bfloat16())
    wanted = torch.autograd.grad(expected, wide, grad.bfloat16().double())
    for one, other in zip((found, *grads), (expected, *wanted), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 2**-7 * other.norm()


def test_pieces_take_only_keys_inside_their_windows() -> None:
    spans = shared_prompt(0, 100, [50, 30])
    pieces = cut(spans, 64, 16)
    assert [p.rows for p in pieces] == [(0, 64), (64, 100), (100, 150), (150, 180)]
    # of the prompt a response sees the last 15
    assert [p.keys for p in pieces] == [
        ((0, 64),),
        ((49, 100),),
        ((85, 150),),
        ((85, 100), (150, 180)),
    ]
    assert all(p.num_keys <= p.num_queries + 15 for p in cut(spans, 8, 16))


def test_layers_have_options_of_their_own() -> None:
    spans, num_keys = shared_prompt(0, 20, [9, 9]), 38
    wide, narrow = AttentionOptions(scale=0.5), AttentionOptions(scale=0.5, window=4)
    attend = PackedAttention(
        spans,
        make_kernel("blocked"),
        options=[narrow, None, wide, narrow],
        dtype=torch.float64,
        device=CPU,
    )
    (q, k, v, _), _ = inputs(spans, num_keys, 2, WIDTH)
    for layer, options in ((0, narrow), (2, wide), (3, narrow)):
        expected = dense(q, k, v, dense_mask(spans, num_keys, options.window), options)
        torch.testing.assert_close(attend(layer, q, k, v), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError, match="layer 1 has no softmax attention"):
        attend(1, q, k, v)


def test_a_kernel_that_lacks_what_the_model_needs_is_refused_or_not_chosen() -> None:
    half = torch.bfloat16
    plain = resolve_attention("auto", CUDA, half)
    for needs, lacking in (
        (AttentionNeeds(sinks=True), "sinks"),
        (AttentionNeeds(softcap=True), "soft cap"),
        (AttentionNeeds(widths=(512,)), "heads of more than 256 dims"),
    ):
        with pytest.raises(ValueError, match=rf"model\.attention=varlen .*{lacking}: set it to"):
            resolve_attention("varlen", CUDA, half, needs)
        if plain == "varlen":
            assert resolve_attention("auto", CUDA, half, needs) == "flex"
        for name in ("flex", "sdpa"):
            assert resolve_attention(name, CUDA, half, needs) == name
        assert resolve_attention("auto", CPU, torch.float32, needs) == "blocked"
    assert resolve_attention("auto", CUDA, half, AttentionNeeds(widths=(256,))) == plain
