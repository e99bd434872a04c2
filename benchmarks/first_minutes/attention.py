"""Stage `attention`: reads of the paged kernel in decode steps, and training's attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from first_minutes.cards import scaled
from first_minutes.cases import Case, Outcome, Setting
from first_minutes.clock import device_s
from spmdrl.models.attention import make_kernel, resolve_attention
from spmdrl.models.spans import Span
from spmdrl.models.specs import AttentionOptions
from spmdrl.rollout.native.varlen import varlen_attn

_PAGE, _DIM = 256, 128
_ROUNDING = 2.0**-8
"""Error of a bfloat16 result of weights in bfloat16: a unit in the last place."""


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Queries, pages of keys and values, and the table that finds them."""

    query: Tensor  # [N, H, d]
    keys: Tensor  # [pages, 256, KVH, d]
    values: Tensor
    table: Tensor  # [N, pages of a sample] int32
    used: Tensor  # [N] int32


def cases(setting: Setting) -> Iterator[Case]:
    shapes: tuple[tuple[int, int, int, int], ...] = (
        (12, 2, 64, 1024),
        (12, 2, 256, 1024),
        (32, 8, 64, 1024),
        (32, 8, 8, 8192),
    )
    if setting.small:
        shapes = ((4, 2, 3, 512),)
    for heads, kv_heads, samples, context in shapes:
        for packed in (False, True):
            for splits in (1, None):
                kind = f"{'packed' if packed else 'each head'}, splits {splits or 'free'}"
                name = f"decode {heads}/{kv_heads} heads, n={samples}, context {context}: {kind}"
                size = (heads, kv_heads, samples, context)
                yield Case(name=name, run=partial(decode, setting, *size, packed, splits))
    for heads, kv_heads in ((12, 2), (32, 8)) if not setting.small else ((4, 2),):
        name = f"training {heads}/{kv_heads} heads"
        yield Case(name=name, run=partial(training, setting, heads, kv_heads))


def make_pages(
    device: torch.device, heads: int, kv_heads: int, samples: int, context: int
) -> Pages:
    width = -(-context // _PAGE)
    pages = (samples * width, _PAGE, kv_heads, _DIM)
    order = torch.randperm(samples * width).view(samples, width)
    return Pages(
        query=torch.randn(samples, heads, _DIM, device=device).bfloat16(),
        keys=torch.randn(pages, device=device).bfloat16(),
        values=torch.randn(pages, device=device).bfloat16(),
        table=order.to(device, torch.int32),
        used=torch.randint(1, context + 1, (samples,)).to(device, torch.int32),
    )


def exact(pages: Pages) -> Tensor:
    """Compute attention of the pages in float32, `[N, H, d]`."""
    group = pages.query.shape[1] // pages.keys.shape[2]
    keys, values = (
        x[pages.table.long()].flatten(1, 2).transpose(1, 2).float().repeat_interleave(group, 1)
        for x in (pages.keys, pages.values)
    )
    places = torch.arange(keys.shape[2], device=keys.device)
    hidden = places[None] >= pages.used[:, None]
    scores = pages.query[:, :, None].float() @ keys.transpose(2, 3) * _DIM**-0.5
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    return (weights @ values)[:, :, 0]


def decode(
    setting: Setting,
    heads: int,
    kv_heads: int,
    samples: int,
    context: int,
    packed: bool,
    splits: int | None,
) -> Outcome:
    """Time one layer of a decode step.

    With both window arguments negative the kernel packs the query heads of a key head, and reads
    keys once; otherwise once for each query head. Free splits have given wrong rows (issue 194167
    of pytorch): the error shows whether they still do.
    """
    kernel = varlen_attn()
    if "block_table" not in inspect.signature(kernel).parameters:
        return Outcome(skipped=f"torch {torch.__version__} has no block table")
    pages = make_pages(setting.device, heads, kv_heads, samples, context)
    starts = torch.arange(samples + 1).to(setting.device, torch.int32)
    old = current_flash_attention_impl() in (None, "FA2")

    def run() -> Tensor:
        out = kernel(
            pages.query,
            pages.keys,
            pages.values,
            starts,
            starts * context if old else None,
            1,
            pages.table.shape[1] * _PAGE,
            window_size=(-1, -1) if packed else (-1, 0),
            enable_gqa=True,
            seqused_k=pages.used,
            block_table=pages.table,
            num_splits=splits,
        )
        assert isinstance(out, Tensor)
        return out

    wanted = exact(pages)
    error = float((run().float() - wanted).norm() / wanted.norm())
    pages.used.fill_(context)
    seconds = device_s(run)
    num_bytes = 2 * samples * context * kv_heads * _DIM * 2
    reads = 1 if packed else heads // kv_heads
    predicted = scaled(setting.ceilings.read_s(num_bytes * reads), 1e6)
    return Outcome(
        predicted={"us": predicted, "relative_error": _ROUNDING},
        measured={"us": seconds * 1e6, "relative_error": error, "tb_s": num_bytes / seconds / 1e12},
    )


def training(setting: Setting, heads: int, kv_heads: int) -> Outcome:
    """Time attention of a microbatch, forward and backward, at the ceiling of products."""
    count, length, dim = (2, 64, 32) if setting.small else (8, 1408, _DIM)
    dtype, device = torch.bfloat16, setting.device
    kind = resolve_attention("auto", device, dtype)
    starts = [i * length for i in range(count)]
    spans = [Span(q_start=s, q_stop=s + length, own=(s, s + length)) for s in starts]
    options = AttentionOptions(scale=dim**-0.5)
    function = make_kernel(kind).prepare(spans, options, dtype=dtype, device=device)
    query, key, value = (
        torch.randn(count * length, n, dim, device=device).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    gradient = torch.randn(count * length, heads, dim, device=device).to(dtype)

    def backward() -> None:
        function(query, key, value).backward(gradient)
        query.grad = key.grad = value.grad = None

    with torch.no_grad():
        forward_s = device_s(lambda: function(query, key, value))
    both_s = device_s(backward)
    flops = 4 * heads * dim * count * length * (length + 1) / 2
    # a backward pass has five products where a forward pass has two
    ceilings = setting.ceilings
    return Outcome(
        predicted={
            "forward_us": scaled(ceilings.product_s(flops), 1e6),
            "forward_backward_us": scaled(ceilings.product_s(3.5 * flops), 1e6),
        },
        measured={"forward_us": forward_s * 1e6, "forward_backward_us": both_s * 1e6},
        facts={"kernel": kind, "forward_tflops": round(flops / forward_s / 1e12, 1)},
    )
