"""Keys that the rows of a stream see, each key in its place, and the blocks of rows and keys that a
kernel computes: a prompt that several responses share is read where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models.spans import Span


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLists:
    """Blocks to compute with each block of one side, in ascending order.

    Args:
        part_count, whole_count: blocks of which not all pairs of a row and a key are seen, and
            blocks of which all are: int32 [1, 1, n].
        part, whole: these blocks, those that count first: int32 [1, 1, n, most].
    """

    part_count: Tensor
    part: Tensor
    whole_count: Tensor
    whole: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.part_count, self.part, self.whole_count, self.whole]


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenKeys:
    """Keys that each row sees: a prompt's in `[first, stop)`, and its own from `own` to itself.

    Args:
        first, stop, own: int32 [rows, up to a multiple of a block]; rows behind the last see none.
        by_rows, by_keys: lists of blocks of keys, and of blocks of rows.
    """

    first: Tensor
    stop: Tensor
    own: Tensor
    by_rows: BlockLists
    by_keys: BlockLists

    def tensors(self) -> list[Tensor]:
        return [self.first, self.stop, self.own, *self.by_rows.tensors(), *self.by_keys.tensors()]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> SeenKeys:
        """Make what `tensors` returned, from its copies on a device."""
        first, stop, own, *lists = tensors
        by_rows, by_keys = (
            BlockLists(part_count=a, part=b, whole_count=c, whole=d)
            for a, b, c, d in (lists[:4], lists[4:])
        )
        return cls(first=first, stop=stop, own=own, by_rows=by_rows, by_keys=by_keys)


def seen_keys(spans: Sequence[Span], window: int | None, block: tuple[int, int]) -> SeenKeys | None:
    """Find what each row of a stream sees, on the host.

    Args:
        block: rows and keys of a block.

    Returns:
        None where it is not of the form of `SeenKeys` (keys of other ranks, prompts of several
        ranges), where no span has a prompt, and for streams of less than two blocks.
    """
    rows, (row_block, key_block) = spans[-1].q_stop, block
    fits = all(s.own == (s.q_start, s.q_stop) and len(s.prefix) <= 1 for s in spans)
    shares = any(span.prefix for span in spans)
    if not fits or not shares or rows <= max(block):
        return None
    padded = -(-rows // row_block) * row_block
    first, stop, own = (torch.zeros(padded, dtype=torch.int32) for _ in range(3))
    own[rows:] = padded
    blocks = -(-rows // row_block), -(-rows // key_block)
    some = torch.zeros(blocks, dtype=torch.bool)
    whole, pieces = torch.zeros(blocks, dtype=torch.int32), torch.zeros(blocks[0])
    for span in spans:
        seen = _seen_of(span, window)
        here = slice(span.q_start, span.q_stop)
        first[here], stop[here], own[here] = seen
        for i in range(span.q_start // row_block, -(-span.q_stop // row_block)):
            a, b = max(span.q_start, i * row_block), min(span.q_stop, (i + 1) * row_block)
            pieces[i] += 1
            # a later row's first keys are no earlier, in the prompt and of its own
            low, high = (int(x) for x in (a - span.q_start, b - 1 - span.q_start))
            ends = int(seen[1][0])
            for start, end in ((int(seen[0][low]), ends), (int(seen[2][low]), b)):
                some[i, start // key_block : -(-end // key_block)] |= start < end
            for start, end in _joined((int(seen[0][high]), ends), (int(seen[2][high]), a + 1)):
                whole[i, -(-start // key_block) : max(end, start) // key_block] += 1
    # the rows behind the last see nothing
    every = whole == pieces[:, None]
    if rows % row_block:
        every[-1] = False
    part = some & ~every
    return SeenKeys(
        first=first,
        stop=stop,
        own=own,
        by_rows=_lists(part, every),
        by_keys=_lists(part.T, every.T),
    )


def _seen_of(span: Span, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first key and the stop of the prompt, and the first own key, of each row: [n]."""
    start, stop = span.prefix[0] if span.prefix else (0, 0)
    count, length = span.num_queries, stop - start
    skipped = torch.zeros(count, dtype=torch.int64)
    if window is not None:
        skipped = (length + torch.arange(count) + 1 - window).clamp(min=0)
    first = start + skipped.clamp(max=length)
    own = span.own[0] + (skipped - length).clamp(min=0)
    return first, torch.full((count,), stop), own


def _joined(one: tuple[int, int], other: tuple[int, int]) -> list[tuple[int, int]]:
    """Join two ranges of keys that touch; both are in order."""
    if one[0] < one[1] and one[1] == other[0]:
        return [(one[0], other[1])]
    return [one, other]


def _lists(part: Tensor, whole: Tensor) -> BlockLists:
    found = []
    for mask in (part, whole):
        count = mask.sum(1, dtype=torch.int32)
        order = mask.int().argsort(dim=1, descending=True, stable=True).int()
        # as narrow as the longest list; two, because a width of one has no stride
        kept = F.pad(order, (0, max(0, 2 - order.shape[1])))[:, : max(2, int(count.max()))]
        found += [count[None, None], kept[None, None].contiguous()]
    return BlockLists(part_count=found[0], part=found[1], whole_count=found[2], whole=found[3])
