"""Where the parts of a blockwise decode step lie: index arithmetic on the host, without tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DecodeIndex:
    """Where the parts of a decode step lie.

    A *unit* is one (block, key-value head) with one sequence's query heads: first those of the
    blocks `[0, num_low)`, one sequence each; then those of `[split, split + num_high)`, with
    `num_users` sequences each (fewer are padded). A *row* is one query head of a unit. Blocks that
    nobody uses have units too; nothing refers to their results.

    Args:
        query: for every unit, which (sequence, key-value head) it asks for: `[units]`.
        rows: for every (sequence, head) the rows of its blocks in order, `[n * H, W]`; one past
            the last row where a sequence has fewer than W blocks.
        back: for every row its place in `rows`, `[units * group]`.
        valid_low, valid_high: tokens held by each block: `[num_low]`, `[num_high]`.
    """

    query: Index
    rows: Index
    back: Index
    valid_low: Index
    valid_high: Index
    split: int
    num_users: int


def decode_index(
    decodes: list[Sequence], block_size: int, kv_heads: int, group: int
) -> DecodeIndex:
    """The index of a decode step; `cached` counts each sequence's newest token."""
    lengths = np.array([s.cached for s in decodes], dtype=np.int64)
    counts = -(-lengths // block_size)
    width, n, heads = int(counts.max()), len(decodes), kv_heads * group
    table = np.full((n, width), -1, dtype=np.int64)
    for i, sequence in enumerate(decodes):
        table[i, : counts[i]] = sequence.blocks[: counts[i]]
    sharable = np.array([s.sharable_blocks(block_size) for s in decodes], dtype=np.int64)

    owner, number = np.nonzero(table >= 0)
    block = table[owner, number]
    held = np.minimum(lengths[owner] - number * block_size, block_size)
    high = number < sharable[owner]
    num_low = int(block[~high].max()) + 1 if not high.all() else 0
    split = int(block[high].min()) if high.any() else 0
    num_high = int(block[high].max()) + 1 - split if high.any() else 0
    user, num_users = _rank_within(block[high])

    first = block * kv_heads  # the unit of key-value head 0
    first[high] = (num_low + (block[high] - split) * num_users) * kv_heads + user
    stride = np.where(high, num_users, 1)
    units = first[:, None] + stride[:, None] * np.arange(kv_heads)  # [pairs, KVH]
    num_units = (num_low + num_high * num_users) * kv_heads
    query = np.zeros(num_units, dtype=np.int64)
    query[units] = owner[:, None] * kv_heads + np.arange(kv_heads)
    unit_rows = (units[:, :, None] * group + np.arange(group)).reshape(-1, heads)  # [pairs, H]
    rows = np.full((n, heads, width), num_units * group, dtype=np.int64)
    rows[owner, :, number] = unit_rows
    back = np.zeros(num_units * group, dtype=np.int64)
    back[unit_rows] = (owner[:, None] * heads + np.arange(heads)) * width + number[:, None]
    valid_low = np.full(num_low, block_size, dtype=np.int64)
    valid_low[block[~high]] = held[~high]
    valid_high = np.full(num_high, block_size, dtype=np.int64)
    valid_high[block[high] - split] = held[high]
    return DecodeIndex(
        query=query,
        rows=rows.reshape(n * heads, width),
        back=back,
        valid_low=valid_low,
        valid_high=valid_high,
        split=split,
        num_users=num_users,
    )


def _rank_within(block: Index) -> tuple[Index, int]:
    """For every entry how many equal ones come before it, and the largest such count plus one."""
    if not block.size:
        return block, 1
    order = np.argsort(block, kind="stable")
    ordered = block[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, block.size])
    rank = np.empty_like(block)
    rank[order] = np.arange(block.size) - np.repeat(starts, sizes)
    return rank, int(sizes.max())
