"""Where the parts of a blockwise decode step lie: index arithmetic on the host, without tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sequence import Sequence

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Region:
    """Adjacent blocks `[first, first + len(valid))` that are read together.

    Args:
        users: sequences per block (blocks with fewer are padded).
        valid: tokens held by each block.
    """

    first: int
    users: int
    valid: Index


@dataclass(frozen=True, kw_only=True)
class DecodeIndex:
    """Where the parts of a decode step lie.

    A *unit* is one (block, key-value head) with one sequence's query heads, in the order of
    regions, blocks, heads, users. A *row* is one query head of a unit. Blocks that nobody uses have
    units too; nothing refers to their results.

    Args:
        regions: at most three: blocks of one sequence each, blocks that several share, and (at the
            pool's very end) blocks that more share.
        query: for every unit, which (sequence, key-value head) it asks for: `[units]`.
        rows: for every (sequence, head) the rows of its blocks in order, `[n * H, W]`; one past
            the last row where a sequence has fewer than W blocks.
        back: for every row its place in `rows`, `[units * group]`.
    """

    regions: list[Region]
    query: Index
    rows: Index
    back: Index


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
    owner, number = np.nonzero(table >= 0)
    block = table[owner, number]
    held = np.minimum(lengths[owner] - number * block_size, block_size)
    is_high = number < np.array([s.num_high for s in decodes], dtype=np.int64)[owner]

    regions: list[Region] = []
    units = np.empty((block.size, kv_heads), dtype=np.int64)  # of every (sequence, block)
    num_units = 0
    for pairs in _split(block, is_high):
        used = block[pairs]
        first = 0 if not is_high[pairs[0]] else int(used.min())
        valid = np.full(int(used.max()) + 1 - first, block_size, dtype=np.int64)
        valid[used - first] = held[pairs]
        rank, users = _rank_within(used)
        unit = ((used - first) * kv_heads)[:, None] + np.arange(kv_heads)
        units[pairs] = num_units + unit * users + rank[:, None]
        num_units += valid.size * kv_heads * users
        regions.append(Region(first=first, users=users, valid=valid))

    query = np.zeros(num_units, dtype=np.int64)
    query[units] = owner[:, None] * kv_heads + np.arange(kv_heads)
    unit_rows = (units[:, :, None] * group + np.arange(group)).reshape(-1, heads)  # [pairs, H]
    rows = np.full((n, heads, width), num_units * group, dtype=np.int64)
    rows[owner, :, number] = unit_rows
    back = np.zeros(num_units * group, dtype=np.int64)
    back[unit_rows] = (owner[:, None] * heads + np.arange(heads)) * width + number[:, None]
    return DecodeIndex(regions=regions, query=query, rows=rows.reshape(n * heads, width), back=back)


def _split(block: Index, is_high: NDArray[np.bool_]) -> list[Index]:
    """The (sequence, block) pairs of each region.

    Shared blocks make one region or two, whichever pads less: what all prompts begin with has many
    more users than a prompt, and lies above.
    """
    low, high = np.flatnonzero(~is_high), np.flatnonzero(is_high)
    if not high.size:
        return [low]
    first = int(block[high].min())
    users = np.bincount(block[high] - first)
    below = np.maximum.accumulate(users)
    above = np.maximum.accumulate(users[::-1])[::-1]
    places = np.arange(1, users.size)
    split = below[:-1] * places + above[1:] * (users.size - places)
    parts = [high]
    if split.size and split.min() < users.size * below[-1]:
        upper = block[high] >= first + 1 + int(split.argmin())
        parts = [high[~upper], high[upper]]
    return [part for part in (low, *parts) if part.size]


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
