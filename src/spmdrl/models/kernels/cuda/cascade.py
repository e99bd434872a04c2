"""Attention of decode steps in which rows that share pages read them together.

Samples of one prompt have its pages in their tables, at the same places. A program of `decode`
reads one split of one row's keys; here the first of the rows that share all pages of a split reads
it for all of them, up to as many as `rows_of_program` says (cascade inference: Ye et al. 2024,
https://flashinfer.ai/2024/02/02/cascade-inference.html; here in one launch). Splits are those of
`decode`, functions of a row's own number of keys, and a row's queries lie in a tile of the same
shape, with the same arithmetic, whoever reads the keys. So who shares decides nothing about a row's
result, to the last bit.

Who shares is told by `sharing` [4, n] int32: the rows, such that those that share pages follow each
other; of each place the first place of its group; the number of keys that its row shares with the
row at the place before, 0 for the first of a group, all in pages that both hold at the same places;
and the most keys that it shares with one of its two neighbours. Splits that are not wholly within
these keys, and the last one of a row, are read by the row itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.kernels.cuda.decode import (
    attend_keys,
    attend_row,
    check,
    first_key,
    keys_of_split,
    memory_of_parts,
    merge_row,
    sizes,
)
from spmdrl.models.kernels.cuda.language import kernel, power_of_2, tl
from spmdrl.models.specs import AttentionOptions

MOST_QUERIES = 32
"""Most queries of a program: more leave the registers."""


def tiles_of(group: int, dims: int) -> int:
    """Return the number of tiles of queries that a program holds.

    Args:
        group: query heads per key-value head.
    """
    return max(1, MOST_QUERIES // sizes(group, dims)["HEADS"])


def rows_of_program(group: int, dims: int) -> int:
    """Return the most rows that read a split together.

    Args:
        group: query heads per key-value head.
    """
    return tiles_of(group, dims) * (sizes(group, dims)["HEADS"] // group)


def cascade_attention(
    q: Tensor,  # [n, H, d], heads side by side; there may be gaps between rows
    keys: Tensor,  # [blocks, block_size, KVH, d]
    values: Tensor,  # [blocks, block_size, KVH, d]
    table: Tensor,  # [n, W] int32
    lengths: Tensor,  # [n] int32
    options: AttentionOptions,
    sinks: Tensor | None = None,  # [H]
    *,
    sharing: Tensor,  # [4, n] int32
    counters: Tensor | None = None,  # [n * KVH] int32, zeros
) -> Tensor:  # [n, H, d]
    """Compute `decode.decode_attention`, in one launch, with shared pages read together.

    Args:
        sharing: see the top of the file.
        counters: see `decode.decode_attention`.
    """
    check(q, keys, values, table, lengths)
    rows, heads, dims = q.shape
    block_size, kv_heads = keys.shape[1], keys.shape[2]
    assert sharing.shape == (4, rows) and sharing.dtype == torch.int32, sharing.shape
    out = q.new_empty(rows, heads, dims)
    if not rows:
        return out
    assert sharing.stride(1) == 1, sharing.stride()
    if counters is None:
        counters = torch.zeros(rows * kv_heads, dtype=torch.int32, device=q.device)
    parts, sums = memory_of_parts(q, table, block_size)
    group = heads // kv_heads
    attend_together[(rows, kv_heads, parts.shape[2])](
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
        sharing,
        options.scale,
        options.softcap or 1.0,
        q.stride(0),
        *keys.stride()[:3],
        table.stride(0),
        sharing.stride(0),
        PAGE=block_size,
        **sizes_together(group, dims),
        WINDOW=options.window or 0,
        CAPPED=options.softcap is not None,
        HAS_SINKS=sinks is not None,
        num_warps=4,
        enable_fp_fusion=False,
        num_stages=3,
    )
    return out


def sizes_together(group: int, dims: int) -> dict[str, int]:
    """Return the sizes that `attend_together` is compiled for.

    Args:
        group: query heads per key-value head.
    """
    places = power_of_2(rows_of_program(group, dims))
    return {**sizes(group, dims), "TILES": tiles_of(group, dims), "PLACES": places}


@kernel
def joins(
    sharing: tl.tensor,
    step: tl.tensor,  # stride of `sharing`
    lengths: tl.tensor,
    at: tl.tensor,  # [PLACES], places
    follows: tl.tensor,  # [PLACES] bool, places that are not the first of a program
    split: tl.tensor,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:  # [PLACES] bool
    """Find places whose split is read with that of the place before.

    Both rows have the split at the same keys, see all of it, and it is the last one of neither.
    """
    row = tl.load(sharing + at, mask=follows, other=0)
    before = tl.load(sharing + at - 1, mask=follows, other=0)
    same = tl.load(sharing + 2 * step + at, mask=follows, other=0)
    own = tl.load(lengths + row, mask=follows, other=0)
    other = tl.load(lengths + before, mask=follows, other=0)
    span = SPLIT * tl.maximum(tl.cdiv(own, SPLIT * MOST_SPLITS), 1)
    other_span = SPLIT * tl.maximum(tl.cdiv(other, SPLIT * MOST_SPLITS), 1)
    start, stop = split * span, split * span + span
    first = tl.maximum(first_key(own, WINDOW), first_key(other, WINDOW))
    seen = (first <= start) & (stop < tl.minimum(own, other)) & (stop <= same)
    return follows & (span == other_span) & seen


@kernel
def rows_together(
    sharing: tl.tensor,
    step: tl.tensor,  # stride of `sharing`
    lengths: tl.tensor,
    place: tl.tensor,
    split: tl.tensor,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
) -> tl.tensor:
    """Count the places from this one on that the program reads the split for; 0 if another program
    reads it for this place.
    """
    begin = tl.load(sharing + step + place)
    begin += (place - begin) // ROWS * ROWS
    offset = tl.arange(0, PLACES)
    at = begin + offset
    follows = (offset > 0) & (offset < ROWS) & (at < tl.num_programs(0))
    joined = joins(sharing, step, lengths, at, follows, split, SPLIT, MOST_SPLITS, WINDOW)
    end = tl.min(tl.where((at > place) & (joined == 0), at, begin + ROWS), 0)
    is_led = tl.max(tl.where((at == place) & joined, 1, 0), 0)
    return tl.where(is_led > 0, 0, end - place)


@kernel
def members_of(
    sharing: tl.tensor,
    place: tl.tensor,
    count: tl.tensor,
    kv_head: tl.tensor,
    tile: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
) -> tl.tuple:  # [HEADS] each
    """Find the row, the head, and whether it is one, of each query in a tile."""
    member = tl.arange(0, HEADS)
    own = tile * (HEADS // GROUP) + member // GROUP
    is_head = (member < HEADS // GROUP * GROUP) & (own < count)
    row = tl.load(sharing + place + own, mask=is_head, other=0).to(tl.int64)
    return row, kv_head * GROUP + member % GROUP, is_head


@kernel
def attend_rows(
    operands: tl.tuple,  # those of `attend_together` from `q` to `out`
    sharing: tl.tensor,
    place: tl.tensor,
    count: tl.tensor,
    kv_head: tl.tensor,
    split: tl.tensor,
    bounds: tl.tuple,  # what `keys_of_split` gave for the first row
    scale: tl.tensor,
    softcap: tl.tensor,
    steps: tl.tuple,  # strides, from `q_row` to `table_row`
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    """Attend to one split for the rows at `count` places, and store its parts."""
    q, keys, values, table, _, _, parts, sums, _, _ = operands
    q_row, block_stride, token_stride, head_stride, table_row = steps
    _, start, stop, _, _ = bounds
    dim = tl.arange(0, WIDE)
    owns: tl.tuple = ()
    for tile in tl.static_range(TILES):
        row, head, is_head = members_of(sharing, place, count, kv_head, tile, GROUP, HEADS)
        mine = is_head[:, None] & (dim < DIMS)[None, :]
        at = row * q_row + head * DIMS
        owns = owns + (tl.load(q + at[:, None] + dim[None, :], mask=mine, other=0.0),)
    pages = table + tl.load(sharing + place).to(tl.int64) * table_row
    strides = block_stride, token_stride, kv_head.to(tl.int64) * head_stride
    given = owns, keys, values, pages, (start * 0, start, stop), strides, scale, softcap
    found = attend_keys(*given, PAGE, DIMS, TILE, TILES, CAPPED)
    for tile in tl.static_range(TILES):
        acc, total, highest = found[tile]
        row, head, is_head = members_of(sharing, place, count, kv_head, tile, GROUP, HEADS)
        mine = is_head[:, None] & (dim < DIMS)[None, :]
        at = (row * tl.num_programs(1) * GROUP + head) * tl.num_programs(2) + split
        tl.store(sums + at, highest + tl.log2(total), mask=is_head)
        tl.store(parts + at[:, None] * DIMS + dim[None, :], acc / total[:, None], mask=mine)


@kernel
def end_rows(
    operands: tl.tuple,  # those of `attend_together` from `q` to `out`
    sharing: tl.tensor,
    place: tl.tensor,
    count: tl.tensor,
    kv_head: tl.tensor,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Count a split that is stored, for the rows at `count` places, and store the results of those
    whose last one it was.
    """
    _, _, _, _, lengths, sinks, parts, sums, counters, out = operands
    kv_heads, slots = tl.num_programs(1), tl.num_programs(2)
    offset = tl.arange(0, PLACES)
    reads = offset < count
    rows = tl.load(sharing + place + offset, mask=reads, other=0)
    # every thread's stores come before the counts, and the counts before the loads below
    tl.debug_barrier()
    ended = tl.atomic_add(
        counters + rows * kv_heads + kv_head, 1, mask=reads, sem="acq_rel", scope="gpu"
    )
    tl.debug_barrier()
    member, dim = tl.arange(0, HEADS), tl.arange(0, WIDE)
    head, is_head = kv_head * GROUP + member, member < GROUP
    mine = is_head[:, None] & (dim < DIMS)[None, :]
    for own in range(count):
        row = tl.load(sharing + place + own).to(tl.int64)
        length = tl.load(lengths + row)
        span = SPLIT * tl.maximum(tl.cdiv(length, SPLIT * MOST_SPLITS), 1)
        low, high = first_key(length, WINDOW) // span, tl.cdiv(length, span)
        if tl.sum(tl.where(offset == own, ended, 0), 0) == high - low - 1:
            at = row * kv_heads * GROUP + head
            target = out + at[:, None] * DIMS + dim[None, :]
            part = parts + (at * slots)[:, None] * DIMS + dim[None, :]
            counter = counters + row * kv_heads + kv_head
            places = target, part, sums + at * slots, sinks + head, counter
            merge_row(places, low, high, mine, is_head, DIMS, HAS_SINKS)


@kernel
def attend_together(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    sinks: tl.tensor,  # these and the others: see `decode.attend_split`
    parts: tl.tensor,
    sums: tl.tensor,
    counters: tl.tensor,
    out: tl.tensor,
    sharing: tl.tensor,  # [4, n] int32
    scale: tl.tensor,
    softcap: tl.tensor,
    q_row: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    table_row: tl.tensor,
    sharing_row: tl.tensor,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PLACES: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Compute a program: one split of the keys of some rows, for one key-value head's queries."""
    place, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, most = tl.load(sharing + place).to(tl.int64), tl.load(sharing + 3 * sharing_row + place)
    bounds = keys_of_split(tl.load(lengths + row), split, SPLIT, MOST_SPLITS, TILE, WINDOW)
    operands = q, keys, values, table, lengths, sinks, parts, sums, counters, out
    steps = q_row, block_stride, token_stride, head_stride, table_row
    count = 1
    if (bounds[1] < bounds[2]) & (bounds[2] <= most):
        count = rows_together(
            *(sharing, sharing_row, lengths, place, split),
            *(SPLIT, MOST_SPLITS, WINDOW, TILES * (HEADS // GROUP), PLACES),
        )
    if count == 1:
        attend_row(
            *(operands, row, kv_head, split, bounds, scale, softcap, steps),
            *(PAGE, GROUP, HEADS, DIMS, WIDE, TILE, CAPPED, HAS_SINKS),
        )
    if count > 1:
        attend_rows(
            *(operands, sharing, place, count, kv_head, split, bounds, scale, softcap, steps),
            *(PAGE, GROUP, HEADS, DIMS, WIDE, TILE, TILES, CAPPED),
        )
        end_rows(
            *(operands, sharing, place, count, kv_head, SPLIT, MOST_SPLITS, WINDOW),
            *(PLACES, GROUP, HEADS, DIMS, WIDE, HAS_SINKS),
        )
