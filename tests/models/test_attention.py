"""Attention of spans against one dense masked softmax."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from dense_attention import dense, dense_mask, shared_prompt
from spmdrl.models.attention import (
    KINDS,
    AttentionKind,
    PackedAttention,
    make_kernel,
    resolve_attention,
)
from spmdrl.models.attention_pieces import cut, group_pieces
from spmdrl.models.attention_varlen import Sequences, VarlenKernel, make_sequences
from spmdrl.models.spans import Span, covers_rows
from spmdrl.models.specs import AttentionOptions

CPU = torch.device("cpu")
PLAIN = [AttentionOptions(scale=8**-0.5)]


CASES: dict[str, tuple[list[Span], int]] = {
    "one": ([Span(q_start=0, q_stop=7, own=(0, 7))], 7),
    "long": ([Span(q_start=0, q_stop=150, own=(0, 150))], 150),
    "packed": (
        [
            Span(q_start=0, q_stop=5, own=(0, 5)),
            Span(q_start=5, q_stop=6, own=(5, 6)),
            Span(q_start=6, q_stop=80, own=(6, 80)),
        ],
        80,
    ),
    "shared": (shared_prompt(0, 9, [3, 1, 70, 4, 4]) + shared_prompt(91, 5, [2, 2, 3]), 103),
    # a chunk of a prefill, and pieces of a context-parallel stream in gathered order
    "later": ([Span(q_start=0, q_stop=4, own=(2, 12)), Span(q_start=4, q_stop=5, own=(0, 3))], 14),
    "ranges": (
        [
            Span(q_start=0, q_stop=3, own=(20, 23), prefix=((8, 10), (0, 4))),
            Span(q_start=3, q_stop=8, own=(4, 9), prefix=((23, 24),)),
        ],
        24,
    ),
}


def inputs(num_queries: int, num_keys: int, kv_heads: int) -> list[Tensor]:
    """q, k, v as views of larger tensors (as the decoder gives them), and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, heads: int) -> Tensor:
        wide = torch.randn(rows, heads + 1, 8, generator=generator, dtype=torch.float64)
        return wide[:, :heads].detach().requires_grad_()

    q, k, v = draw(num_queries, 4), draw(num_keys, kv_heads), draw(num_keys, kv_heads)
    return [q, k, v, torch.randn(q.shape, generator=generator, dtype=torch.float64)]


def check(attend: PackedAttention, spans: list[Span], num_keys: int, kv_heads: int) -> None:
    q, k, v, grad = inputs(spans[-1].q_stop, num_keys, kv_heads)
    expected = dense(q, k, v, dense_mask(spans, num_keys))
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    out = attend(0, q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for found, wanted in zip(
        torch.autograd.grad(out, (q, k, v), grad), expected_grads, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["blocked", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_spans_equal_dense_attention(name: str, kind: AttentionKind, kv_heads: int) -> None:
    spans, num_keys = CASES[name]
    attend = PackedAttention(
        spans, make_kernel(kind), options=PLAIN, dtype=torch.float64, device=CPU
    )
    check(attend, spans, num_keys, kv_heads)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("name", ["packed", "shared", "ranges"])
def test_flex_equals_dense_attention(name: str) -> None:
    spans, num_keys = CASES[name]
    attend = PackedAttention(
        spans, make_kernel("flex"), options=PLAIN, dtype=torch.float64, device=CPU
    )
    q, k, v, _ = inputs(spans[-1].q_stop, num_keys, 2)
    expected = dense(q, k, v, dense_mask(spans, num_keys))
    out = attend(0, q.detach(), k.detach(), v.detach())
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_sequences_of_the_varlen_kernels(name: str) -> None:
    """What flash and varlen are given, through a plain function in their place."""
    spans, num_keys = CASES[name]

    def plain(
        q: Tensor, k: Tensor, v: Tensor, s: Sequences, options: AttentionOptions, _: Tensor | None
    ) -> Tensor:
        ends_q, ends_k = s.ends_q.tolist(), s.ends_k.tolist()
        assert s.most_q == max(s.num_queries for s in spans)
        parts = []
        for i in range(len(spans)):
            rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
            count, length = rows.stop - rows.start, keys.stop - keys.start
            mask = torch.ones(count, length).tril(length - count).bool()
            parts.append(dense(q[rows], k[keys], v[keys], mask))
        return torch.cat(parts)

    attend = PackedAttention(
        spans, VarlenKernel(plain), options=PLAIN, dtype=torch.float64, device=CPU
    )
    check(attend, spans, num_keys, 2)
    in_place = name in ("one", "long", "packed")
    assert (make_sequences(spans, CPU).key_rows is None) == in_place


def test_float32_is_close_to_float64() -> None:
    spans, num_keys = CASES["shared"]
    q, k, v, _ = (x.detach() for x in inputs(spans[-1].q_stop, num_keys, 2))
    expected = dense(q, k, v, dense_mask(spans, num_keys)).float()
    attend = PackedAttention(
        spans, make_kernel("blocked"), options=PLAIN, dtype=torch.float32, device=CPU
    )
    assert (attend(0, q.float(), k.float(), v.float()) - expected).abs().max() < 1e-6


def test_pieces_cover_the_rows_and_like_shapes_share_a_tile() -> None:
    spans = shared_prompt(0, 40, [8] * 16 + [7] * 16)
    pieces = cut(spans, 64)
    groups = list(group_pieces(pieces))
    assert sorted(p.rows for g in groups for p in g) == [(s.q_start, s.q_stop) for s in spans]
    assert len(groups) == 2  # the prompt, and all responses
    assert cut([Span(q_start=0, q_stop=100, own=(0, 100))], 64)[0].keys == ((0, 64),)
    assert cut(shared_prompt(0, 10, [3]), None)[1].keys == ((0, 13),)  # neighbours are joined


def test_rows_without_keys_to_see_are_refused() -> None:
    with pytest.raises(AssertionError):
        Span(q_start=0, q_stop=4, own=(0, 3))
    assert not covers_rows([Span(q_start=1, q_stop=2, own=(0, 3))])


def test_resolution_by_device_and_dtype() -> None:
    cuda = torch.device("cuda")
    assert resolve_attention("auto", CPU, torch.float32) == "blocked"
    assert resolve_attention("auto", CPU, torch.bfloat16) == "sdpa"
    assert resolve_attention("auto", cuda, torch.float32) == "sdpa"
    assert resolve_attention("auto", cuda, torch.bfloat16) in ("varlen", "flash")
    assert resolve_attention("sdpa", CPU, torch.float32) == "sdpa"
    for name, device, dtype in (
        ("varlen", CPU, torch.bfloat16),
        ("flash", cuda, torch.float32),
        ("fast", CPU, torch.float32),
        ("blocked", CPU, torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=r"model\.attention"):
            resolve_attention(name, device, dtype)
    assert set(get_args(AttentionKind)) == {*KINDS, "flash4"}
