"""Attention of decode steps over a paged cache, with the keys of a row split over programs.

The cache is that of the native engine on CUDA (`rollout.native.varlen.VarlenAttention`): keys and
values `[blocks, block size, KV heads, dims]` in one dtype, a table of blocks `[rows, W]` int32, and
the number of keys `[rows]` int32 that each row's single query sees, its own included. Everything
else of a block, and blocks beyond a row's end, may hold anything, NaN included.

A program takes the query heads of one key-value head, and one split of a row's keys; the last of a
row's programs to end merges its splits by the logarithm of their sums (Dao et al. 2023,
Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Splits are merged in
order, and their size is a function of the row's own number of keys (`SPLIT`, and multiples of it in
rows of more than `SPLIT * MOST_SPLITS`), so that a row's result depends on nothing but its own
keys: neither on other rows nor on the width of the table. Products accumulate in float32, as does
the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.kernels.cuda.language import kernel, power_of_2, tl
from spmdrl.models.specs import AttentionOptions

SPLIT = 256
"""Keys of a split: a row of 1024 keys and 8 KV heads keeps 32 programs busy."""

MOST_SPLITS = 32
"""Most splits of a row: their parts are kept in float32 until the last one ends."""

MOST_DIMS = 256
"""Most dims of a head: wider tiles leave the registers."""

_LOG2_E = tl.constexpr(1.4426950408889634)


def covers(head_dim: int, block_size: int) -> bool:
    """Whether `decode_attention` takes heads and blocks of these sizes."""
    return head_dim % 8 == 0 and head_dim <= MOST_DIMS and block_size == power_of_2(block_size)


def decode_attention(
    q: Tensor,  # [n, H, d], heads side by side; there may be gaps between rows
    keys: Tensor,  # [blocks, block_size, KVH, d]
    values: Tensor,  # [blocks, block_size, KVH, d]
    table: Tensor,  # [n, W] int32
    lengths: Tensor,  # [n] int32
    options: AttentionOptions,
    sinks: Tensor | None = None,  # [H]
    *,
    counters: Tensor | None = None,  # [n * KVH] int32, zeros
) -> Tensor:  # [n, H, d]
    """Attend for one query of each row; a row of length 0 gives zeros.

    Launches one kernel and waits for nothing. `covers` says which sizes it takes.

    Args:
        counters: memory for the numbers of splits that have ended. It is zero again when the kernel
            ends, so that all calls of one stream may share it; None: it is made and cleared here.
    """
    check(q, keys, values, table, lengths)
    rows, heads, dims = q.shape
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    out = q.new_empty(rows, heads, dims)
    if not rows:
        return out
    if counters is None:
        counters = torch.zeros(rows * kv_heads, dtype=torch.int32, device=q.device)
    assert counters.dtype == torch.int32 and counters.numel() >= rows * kv_heads, counters.shape
    parts, sums = memory_of_parts(q, table, block_size)
    attend_split[(rows, kv_heads, parts.shape[2])](
        q,
        keys,
        values,
        table,
        lengths,
        sums if sinks is None else sinks,
        parts,
        sums,
        counters,
        out,
        options.scale,
        options.softcap or 1.0,
        q.stride(0),
        *keys.stride()[:3],
        table.stride(0),
        PAGE=block_size,
        **sizes(heads // kv_heads, dims),
        WINDOW=options.window or 0,
        CAPPED=options.softcap is not None,
        HAS_SINKS=sinks is not None,
        num_warps=4,
        enable_fp_fusion=False,  # products are fused where the kernel says so, in any program
        num_stages=3,
    )
    return out


def check(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Assert that the operands of `decode_attention` fit together."""
    heads, dims = q.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    assert keys.shape == values.shape and keys.stride() == values.stride(), (keys, values)
    assert covers(dims, block_size), (dims, block_size)
    assert keys.shape[3] == dims and heads % kv_heads == 0, (q.shape, keys.shape)
    assert q.dtype == keys.dtype == values.dtype, (q.dtype, keys.dtype, values.dtype)
    assert q.stride(1) == dims, "heads lie side by side"
    assert q.stride(2) == keys.stride(3) == table.stride(1) == lengths.stride(0) == 1


def memory_of_parts(q: Tensor, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Make memory for the parts of splits [n, H, splits, d], and for their sums [n, H, splits]."""
    splits = min(MOST_SPLITS, -(-table.shape[1] * block_size // SPLIT))
    parts = torch.empty(*q.shape[:2], splits, q.shape[2], dtype=torch.float32, device=q.device)
    return parts, torch.empty(*q.shape[:2], splits, dtype=torch.float32, device=q.device)


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
        "MOST_SPLITS": MOST_SPLITS,
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
def keys_of_split(
    length: tl.tensor,
    split: tl.tensor,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tuple:
    """Find the row's first key, the split's range of keys, and the range of the row's splits."""
    first = first_key(length, WINDOW)
    span = SPLIT * tl.maximum(tl.cdiv(length, SPLIT * MOST_SPLITS), 1)
    start = tl.maximum(split * span, first // TILE * TILE)
    stop = tl.minimum(split * span + span, length)
    return first, start, stop, first // span, tl.cdiv(length, span)


@kernel
def attend_keys(
    owns: tl.tuple,  # tiles of queries [HEADS, WIDE]
    keys: tl.tensor,
    values: tl.tensor,
    pages: tl.tensor,  # the row's part of the table
    bounds: tl.tuple,  # the row's first key, and the split's range
    strides: tl.tuple,  # of blocks and of tokens, and the place of the head
    scale: tl.tensor,
    softcap: tl.tensor,
    PAGE: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    CAPPED: tl.constexpr,
) -> tl.tuple:  # of each tile ([HEADS, WIDE], [HEADS], [HEADS])
    """Sum weighted values, and weights, relative to the highest score, which comes third.

    Keys and values are read once for all tiles. A tile's arithmetic does not depend on the others.
    """
    HEADS: tl.constexpr = owns[0].shape[0]
    WIDE: tl.constexpr = owns[0].shape[1]
    first, start, stop = bounds
    block_stride, token_stride, head_place = strides
    dim = tl.arange(0, WIDE)
    found: tl.tuple = ()
    for _ in tl.static_range(TILES):
        highest = tl.full([HEADS], float("-inf"), tl.float32)
        zeros = tl.zeros([HEADS, WIDE], tl.float32)
        found = found + ((zeros, tl.zeros([HEADS], tl.float32), highest),)
    for begin in range(start, stop, TILE):
        place = begin + tl.arange(0, TILE)
        seen = (place >= first) & (place < stop)
        block = tl.load(pages + place // PAGE, mask=seen, other=0)
        key = block.to(tl.int64) * block_stride + (place % PAGE) * token_stride
        key += head_place
        read = seen[:, None] & (dim < DIMS)[None, :]
        k = tl.load(keys + key[:, None] + dim[None, :], mask=read, other=0.0)
        v = tl.load(values + key[:, None] + dim[None, :], mask=read, other=0.0)
        summed: tl.tuple = ()
        for tile in tl.static_range(TILES):
            score = scores(owns[tile], k, scale, softcap, CAPPED)
            score = tl.where(seen[None, :], score, float("-inf"))
            summed = summed + (add_keys(found[tile], score, v),)
        found = summed
    return found


@kernel
def add_keys(found: tl.tuple, score: tl.tensor, v: tl.tensor) -> tl.tuple:
    """Add a tile of keys to what `attend_keys` has summed, by their scores."""
    acc, total, highest = found
    now = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - now[:, None])
    kept = tl.exp2(highest - now)
    total = tl.fma(total, kept, tl.sum(weight, 1))
    acc = acc * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return acc, total, now


@kernel
def spread(x: tl.tensor, shape: tl.constexpr) -> tl.tensor:
    """Broadcast a column over the rows of a tile."""
    return tl.broadcast_to(x[:, None], shape)


@kernel
def sink_of(sinks: tl.tensor, is_head: tl.tensor, HAS_SINKS: tl.constexpr) -> tl.tuple:
    """Return a sink's score and its weight: it is one more score, whose value is zero."""
    best, whole = tl.full(is_head.shape, float("-inf"), tl.float32), tl.where(is_head, 0.0, 0.0)
    if HAS_SINKS:
        sink = tl.load(sinks, mask=is_head, other=0.0)
        best, whole = sink.to(tl.float32) * _LOG2_E, whole + 1.0
    return best, whole


@kernel
def merge_row(
    places: tl.tuple,  # pointers to the row's result, to the part and the sum of its split 0 (all
    # [HEADS, WIDE] or [HEADS]), to the sinks [HEADS], and to the number of its splits that ended
    low: tl.tensor,  # the row's first split
    high: tl.tensor,  # the end of its splits
    mine: tl.tensor,  # [HEADS, WIDE] bool
    is_head: tl.tensor,  # [HEADS] bool
    DIMS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Store a row's result, all of whose splits have ended."""
    target, parts, sums, sinks, counter = places
    best, total = sink_of(sinks, is_head, HAS_SINKS)
    acc = tl.zeros(mine.shape, tl.float32)
    for other in range(low, high):
        # not from a cache that does not see other processors' stores
        logarithm = tl.load(sums + other, mask=is_head, other=0.0, cache_modifier=".cg")
        part = tl.load(parts + other * DIMS, mask=mine, other=0.0, cache_modifier=".cg")
        now = tl.maximum(best, logarithm)
        kept, weight = tl.exp2(best - now), tl.exp2(logarithm - now)
        acc = tl.fma(acc, spread(kept, acc.shape), part * weight[:, None])
        total = tl.fma(total, kept, weight)
        best = now
    tl.store(counter, 0)
    tl.store(target, (acc / total[:, None]).to(target.dtype.element_ty), mask=mine)


@kernel
def end_split(
    found: tl.tuple,  # what `attend_keys` gave for a tile
    places: tl.tuple,  # see `merge_row`
    splits: tl.tuple,  # this one, the row's first one, and the end of its splits
    mine: tl.tensor,  # [HEADS, WIDE] bool
    is_head: tl.tensor,  # [HEADS] bool
    DIMS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Store a split's part, and if it is the last of the row's splits to end, the row's result."""
    target, parts, sums, sinks, counter = places
    acc, total, highest = found
    split, low, high = splits
    if high - low > 1:
        tl.store(sums + split, highest + tl.log2(total), mask=is_head)
        tl.store(parts + split * DIMS, acc / total[:, None], mask=mine)
        # every thread's stores come before the count, and the count before the loads below
        tl.debug_barrier()
        ended = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if ended == high - low - 1:
            merge_row(places, low, high, mine, is_head, DIMS, HAS_SINKS)
    else:
        # the sum of this split is relative to its highest score
        best, whole = sink_of(sinks, is_head, HAS_SINKS)
        now = tl.maximum(best, highest)
        kept = tl.exp2(highest - now)
        acc, total = acc * kept[:, None], tl.fma(total, kept, whole * tl.exp2(best - now))
        tl.store(target, (acc / total[:, None]).to(target.dtype.element_ty), mask=mine)


@kernel
def attend_row(
    operands: tl.tuple,  # those of `attend_split` from `q` to `out`
    row: tl.tensor,
    kv_head: tl.tensor,
    split: tl.tensor,
    bounds: tl.tuple,  # what `keys_of_split` gave
    scale: tl.tensor,
    softcap: tl.tensor,
    steps: tl.tuple,  # strides of `attend_split`, from `q_row` to `table_row`
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Attend to one split of a row's keys, for the query heads of one key-value head."""
    q, keys, values, table, _, sinks, parts, sums, counters, out = operands
    q_row, block_stride, token_stride, head_stride, table_row = steps
    first, start, stop, low, high = bounds
    kv_heads, slots = tl.num_programs(1), tl.num_programs(2)
    member, dim = tl.arange(0, HEADS), tl.arange(0, WIDE)
    head, is_head = kv_head * GROUP + member, member < GROUP
    mine = is_head[:, None] & (dim < DIMS)[None, :]
    at = row * kv_heads * GROUP + head
    target = out + at[:, None] * DIMS + dim[None, :]
    if (high == 0) & (split == 0):
        tl.store(target, tl.zeros([HEADS, WIDE], out.dtype.element_ty), mask=mine)
    if start < stop:
        own = tl.load(q + row * q_row + head[:, None] * DIMS + dim[None, :], mask=mine, other=0.0)
        pages, places = table + row * table_row, (first, start, stop)
        strides = block_stride, token_stride, kv_head.to(tl.int64) * head_stride
        given = (own,), keys, values, pages, places, strides, scale, softcap
        found = attend_keys(*given, PAGE, DIMS, TILE, 1, CAPPED)
        part = parts + (at * slots)[:, None] * DIMS + dim[None, :]
        counter = counters + row * kv_heads + kv_head
        stored = target, part, sums + at * slots, sinks + head, counter
        end_split(found[0], stored, (split, low, high), mine, is_head, DIMS, HAS_SINKS)


@kernel
def attend_split(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    sinks: tl.tensor,  # [H], unread without HAS_SINKS
    parts: tl.tensor,  # [n, H, splits, d] float32, written: the split's attention
    sums: tl.tensor,  # [n, H, splits] float32, written: log2 of the split's sum of e^score
    counters: tl.tensor,  # [n, KVH] int32, zeros before and after
    out: tl.tensor,  # [n, H, d], written
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
    MOST_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Compute a program: one split of a row's keys, for the query heads of one key-value head."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    bounds = keys_of_split(tl.load(lengths + row), split, SPLIT, MOST_SPLITS, TILE, WINDOW)
    operands = q, keys, values, table, lengths, sinks, parts, sums, counters, out
    steps = q_row, block_stride, token_stride, head_stride, table_row
    attend_row(
        *(operands, row, kv_head, split, bounds, scale, softcap, steps),
        *(PAGE, GROUP, HEADS, DIMS, WIDE, TILE, CAPPED, HAS_SINKS),
    )
