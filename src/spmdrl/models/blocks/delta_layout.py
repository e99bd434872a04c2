"""Segments of a packed stream for recurrent layers: which rows continue which.

Attention sees keys; a recurrence continues a state. A span without prefix starts from nothing, and
one with a prefix continues the state at the end of that prefix, wherever it lies in the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.memory.host_copies import to_device
from spmdrl.models.spans import Range, Span

CHUNK_SIZES = (64, 32, 16)
_MOST_PADDING = 1.25
"""Most rows per token in chunks of a size, unless the size is the smallest."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows `[start, stop)` of a stream.

    Args:
        parent: number of the earlier segment that it continues; None: it begins a sequence.
    """

    start: int
    stop: int
    parent: int | None = None


def segments_of(spans: Sequence[Span]) -> tuple[Segment, ...]:
    """Cut the rows of spans, which cover a whole stream, into segments.

    A span whose first rows are a prefix of others is cut there.
    """
    ends = {span.prefix[-1][1] for span in spans if span.prefix}
    segments: list[Segment] = []
    number_of: dict[tuple[Range, ...], int] = {}
    for span in spans:
        assert span.own == (span.q_start, span.q_stop), f"keys of rows elsewhere: {span}"
        assert not span.prefix or span.prefix in number_of, f"no span ends with the prefix: {span}"
        parent = number_of[span.prefix] if span.prefix else None
        start = span.q_start
        for stop in [*sorted(e for e in ends if start < e < span.q_stop), span.q_stop]:
            segments.append(Segment(start=start, stop=stop, parent=parent))
            parent = len(segments) - 1
            number_of[(*span.prefix, (span.q_start, stop))] = parent
            start = stop
    return tuple(segments)


def chunk_size_for(lengths: Sequence[int]) -> int:
    """Choose the number of rows per chunk: the largest that pads little."""
    total = sum(lengths)
    for size in CHUNK_SIZES:
        if sum(-(-length // size) * size for length in lengths) <= _MOST_PADDING * total:
            return size
    return CHUNK_SIZES[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Laid:
    """Rows of a stream laid out for the convolution: each segment behind the K - 1 rows before it.

    Row t of a segment at place p of `starts` is row p + t - start of the convolution's result.

    Args:
        rows: int64 [L], the stream's row of each; any where the sequence had not begun.
        absent: int64 [A], places in `rows` before a sequence's begin.
        given: int64 [A], the row of each of them in the sequences' windows, K - 1 for each
            segment without parent.
        ends: int64 [segments, K - 1], places in `rows` of the K - 1 rows up to each segment's end,
            some of which may lie before it.
        starts: places of the segments.
    """

    rows: Tensor
    absent: Tensor
    given: Tensor
    ends: Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """Chunks of c rows, ordered so that a step of `scan_chunks` computes neighbours.

    Args:
        tokens: int64 [n, c], row of the stream; any where a chunk has no token.
        convolved: int64 [n, c], the same in the convolution's result.
        is_token: bool [n, c, 1].
        sizes, previous: see `scan_chunks`.
        places: int64 [T], each row's place in the n * c rows.
        last: int64 [segments], the last chunk of each segment.
    """

    tokens: Tensor
    convolved: Tensor
    is_token: Tensor
    sizes: tuple[int, ...]
    previous: tuple[Tensor | None, ...]
    places: Tensor
    last: Tensor


def lay_out(segments: Sequence[Segment], conv_size: int, device: torch.device) -> Laid:
    """Lay out segments that cover a stream, in order, for a convolution of `conv_size`."""
    window = conv_size - 1
    roots = [i for i, segment in enumerate(segments) if segment.parent is None]
    root_number = {segment: number for number, segment in enumerate(roots)}
    rows: list[Tensor] = []
    absent: list[int] = []
    given: list[int] = []
    starts: list[int] = []
    ends: list[list[int]] = []
    at = 0
    for number, segment in enumerate(segments):
        before, root = _rows_before(segments, number, window)
        missing = window - len(before)
        absent += range(at, at + missing)
        first = root_number[root] * window + window - missing
        given += range(first, first + missing)
        rows += [torch.tensor([0] * missing + before, dtype=torch.int64)]
        rows += [torch.arange(segment.start, segment.stop)]
        starts.append(at)
        at += segment.stop - segment.start
        ends.append([*range(at, at + window)])
        at += window
    moved = to_device(
        [torch.cat(rows), *(torch.tensor(x, dtype=torch.int64) for x in (absent, given, ends))],
        device,
    )
    return Laid(rows=moved[0], absent=moved[1], given=moved[2], ends=moved[3], starts=tuple(starts))


def _rows_before(segments: Sequence[Segment], number: int, count: int) -> tuple[list[int], int]:
    """Find the last `count` rows before a segment in its sequence, fewer if that begins later; with
    the number of the segment that holds the first of them.
    """
    found: list[int] = []
    while (parent := segments[number].parent) is not None:
        number, segment = parent, segments[parent]
        start = max(segment.start, segment.stop - (count - len(found)))
        found = [*range(start, segment.stop), *found]
    return found, number


def cut_chunks(
    segments: Sequence[Segment],
    starts: Sequence[int],
    device: torch.device,
    size: int | None = None,
) -> Chunks:
    """Cut segments into chunks of `size` rows; None: a size that pads little.

    Args:
        starts: the segments' places in the convolution's result, see `Laid`.
    """
    if size is None:
        size = chunk_size_for([s.stop - s.start for s in segments])
    by_depth, before, last_of = _by_depth(segments, size)
    sizes = tuple(map(len, by_depth))
    first = [sum(sizes[:depth]) for depth in range(len(sizes))]
    chunks = [chunk for level in by_depth for chunk in level]
    offset = torch.tensor([c * size for _, c in chunks])[:, None] + torch.arange(size)
    length, start, laid = (
        torch.tensor([value[number] for number, _ in chunks])[:, None]
        for value in (
            [s.stop - s.start for s in segments],
            [s.start for s in segments],
            list(starts),
        )
    )
    is_token = offset < length
    offset = offset.where(is_token, 0)
    tokens = start + offset
    places = torch.empty(int(is_token.sum()), dtype=torch.int64)
    places[tokens[is_token]] = is_token.flatten().nonzero()[:, 0]
    last = torch.tensor([first[depth] + place for depth, place in last_of])
    same = [
        None if places == list(range(sizes[depth])) else torch.tensor(places)
        for depth, places in enumerate(before[1:])
    ]
    found = (tokens, laid + offset, is_token.unsqueeze(-1), places, last)
    moved = to_device([*found, *(p for p in same if p is not None)], device)
    others = iter(moved[len(found) :])
    return Chunks(
        tokens=moved[0],
        convolved=moved[1],
        is_token=moved[2],
        sizes=sizes,
        previous=tuple(None if p is None else next(others) for p in same),
        places=moved[3],
        last=moved[4],
    )


def _by_depth(
    segments: Sequence[Segment], size: int
) -> tuple[list[list[tuple[int, int]]], list[list[int]], list[tuple[int, int]]]:
    """Order chunks by the number of chunks before them in their sequences.

    Returns for each depth its chunks (segment, number of the chunk in it); for each of these the
    place of the one before it; and each segment's last chunk (depth, place).
    """
    by_depth: list[list[tuple[int, int]]] = []
    before: list[list[int]] = []
    last_of: list[tuple[int, int]] = []
    for number, segment in enumerate(segments):
        depth, place = (-1, 0) if segment.parent is None else last_of[segment.parent]
        for chunk in range(-(-(segment.stop - segment.start) // size)):
            depth += 1
            if depth == len(by_depth):
                by_depth.append([])
                before.append([])
            before[depth].append(place)
            place = len(by_depth[depth])
            by_depth[depth].append((number, chunk))
        last_of.append((depth, place))
    return by_depth, before, last_of
