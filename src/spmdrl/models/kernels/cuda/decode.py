"""Attention of decode steps over a paged cache, with the keys of a row split over programs.

The cache is that of the native engine on CUDA (`rollout.native.varlen.VarlenAttention`): keys and
values `[blocks, block size, KV heads, dims]` in one dtype, a table of blocks `[rows, W]` int32, and
the number of keys `[rows]` int32 that each row's single query sees, its own included. Everything
else of a block, and blocks beyond a row's end, may hold anything, NaN included.

A program takes the query heads of one key-value head, and `SPLIT` keys of one row; a second kernel
merges the splits by the logarithm of their sums (Dao et al. 2023, Flash-Decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Splits begin at multiples of `SPLIT` and
are merged in order, so that a row's result depends on nothing but its own keys: neither on other
rows nor on the width of the table. Products accumulate in float32, as does the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.kernels.cuda.language import kernel, power_of_2, tl
from spmdrl.models.specs import AttentionOptions

SPLIT = 256
"""Keys of a split: a row of 1024 keys and 8 KV heads keeps 32 programs busy."""

MOST_DIMS = 256
"""Most dims of a head: wider tiles leave the registers."""

_LOG2_E = tl.constexpr(1.4426950408889634)


def decode_attention(
    q: Tensor,  # [n, H, d], heads side by side; there may be gaps between rows
    keys: Tensor,  # [blocks, block_size, KVH, d]
    values: Tensor,  # [blocks, block_size, KVH, d]
    table: Tensor,  # [n, W] int32
    lengths: Tensor,  # [n] int32
    options: AttentionOptions,
    sinks: Tensor | None = None,  # [H]
) -> Tensor:  # [n, H, d]
    """Attend for one query of each row; a row of length 0 gives zeros.

    Launches two kernels and waits for nothing. Needs a block size that is a power of two, and d a
    multiple of 8 up to `MOST_DIMS`.
    """
    _check(q, keys, values, table, lengths)
    rows, heads, dims = q.shape
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    out = q.new_empty(rows, heads, dims)
    if not rows:
        return out
    splits = -(-table.shape[1] * block_size // SPLIT)
    parts = torch.empty(rows, heads, splits, dims, dtype=torch.float32, device=q.device)
    sums = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    attend_split[(rows, kv_heads, splits)](
        q,
        keys,
        values,
        table,
        lengths,
        parts,
        sums,
        options.scale,
        options.softcap or 1.0,
        q.stride(0),
        *keys.stride()[:3],
        table.stride(0),
        PAGE=block_size,
        **sizes(heads // kv_heads, dims),
        WINDOW=options.window or 0,
        CAPPED=options.softcap is not None,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )
    merge_splits[(rows, heads)](
        parts,
        sums,
        sums if sinks is None else sinks,
        lengths,
        out,
        splits,
        SPLIT=SPLIT,
        DIMS=dims,
        WIDE=power_of_2(dims),
        WINDOW=options.window or 0,
        HAS_SINKS=sinks is not None,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out


def _check(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> None:
    heads, dims = q.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    assert keys.shape == values.shape and keys.stride() == values.stride(), (keys, values)
    assert block_size == power_of_2(block_size) and dims % 8 == 0 and dims <= MOST_DIMS
    assert keys.shape[3] == dims and heads % kv_heads == 0, (q.shape, keys.shape)
    assert q.dtype == keys.dtype == values.dtype, (q.dtype, keys.dtype, values.dtype)
    assert q.stride(1) == dims, "heads lie side by side"
    assert q.stride(2) == keys.stride(3) == table.stride(1) == lengths.stride(0) == 1


def sizes(group: int, dims: int) -> dict[str, int]:
    """Return the sizes that `attend_split` is compiled for.

    Args:
        group: query heads per key-value head.
    """
    return {
        "GROUP": group,
        "HEADS": max(16, power_of_2(group)),  # rows of a tensor core's product
        "DIMS": dims,
        "WIDE": power_of_2(dims),
        "SPLIT": SPLIT,
        "TILE": 64 if dims <= 128 else 32,
    }


@kernel
def first_key(length: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """Find the first key that a row's query sees; a `WINDOW` of 0 is none."""
    if WINDOW > 0:
        return tl.maximum(length - WINDOW, 0)
    return length * 0


@kernel
def scores(
    q: tl.tensor, k: tl.tensor, scale: tl.tensor, softcap: tl.tensor, CAPPED: tl.constexpr
) -> tl.tensor:
    """Compute the scores of a tile of keys, for exponentials to the base of 2."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        # tanh; where e^2x overflows it is 1
        score = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * score / softcap)))
    return score * _LOG2_E


@kernel
def attend_split(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    parts: tl.tensor,  # [n, H, splits, d] float32, written: the split's attention
    sums: tl.tensor,  # [n, H, splits] float32, written: log2 of the split's sum of e^score
    scale: tl.tensor,
    softcap: tl.tensor,
    q_row: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    table_row: tl.tensor,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    """Attend to one split of a row's keys, for the query heads of one key-value head."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = first_key(length, WINDOW)
    start = tl.maximum(split * SPLIT, first // TILE * TILE)
    stop = tl.minimum(split * SPLIT + SPLIT, length)
    if start >= stop:
        return
    member, dim = tl.arange(0, HEADS), tl.arange(0, WIDE)
    head = kv_head * GROUP + member
    mine = (member < GROUP)[:, None] & (dim < DIMS)[None, :]
    own = tl.load(q + row * q_row + head[:, None] * DIMS + dim[None, :], mask=mine, other=0.0)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDE], tl.float32)
    for begin in range(start, stop, TILE):
        place = begin + tl.arange(0, TILE)
        seen = (place >= first) & (place < stop)
        block = tl.load(table + row * table_row + place // PAGE, mask=seen, other=0)
        at = block.to(tl.int64) * block_stride + (place % PAGE) * token_stride
        at += kv_head.to(tl.int64) * head_stride
        read = seen[:, None] & (dim < DIMS)[None, :]
        k = tl.load(keys + at[:, None] + dim[None, :], mask=read, other=0.0)
        score = scores(own, k, scale, softcap, CAPPED)
        score = tl.where(seen[None, :], score, float("-inf"))
        now = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - now[:, None])
        kept = tl.exp2(highest - now)
        v = tl.load(values + at[:, None] + dim[None, :], mask=read, other=0.0)
        total = total * kept + tl.sum(weight, 1)
        acc = acc * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = now
    at = (row * tl.num_programs(1) * GROUP + head) * tl.num_programs(2) + split
    tl.store(sums + at, highest + tl.log2(total), mask=member < GROUP)
    tl.store(parts + at[:, None] * DIMS + dim[None, :], acc / total[:, None], mask=mine)


@kernel
def merge_splits(
    parts: tl.tensor,  # [n, H, splits, d] float32
    sums: tl.tensor,  # [n, H, splits] float32
    sinks: tl.tensor,  # [H], unread without HAS_SINKS
    lengths: tl.tensor,  # [n]
    out: tl.tensor,  # [n, H, d], written
    splits: tl.tensor,
    SPLIT: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Merge the splits of one row and head that hold keys which the row's query sees."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * tl.num_programs(1) + head
    length, dim = tl.load(lengths + row), tl.arange(0, WIDE)
    acc = tl.zeros([WIDE], tl.float32)
    # a sink is one more score, whose value is zero
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        total += 1.0
    for split in range(first_key(length, WINDOW) // SPLIT, tl.cdiv(length, SPLIT)):
        own = tl.load(sums + at * splits + split)
        part = tl.load(parts + (at * splits + split) * DIMS + dim, mask=dim < DIMS, other=0.0)
        now = tl.maximum(highest, own)
        kept, weight = tl.exp2(highest - now), tl.exp2(own - now)
        acc = acc * kept + part * weight
        total = total * kept + weight
        highest = now
    found = acc / tl.where(length > 0, total, 1.0)
    tl.store(out + at * DIMS + dim, found.to(out.dtype.element_ty), mask=dim < DIMS)
