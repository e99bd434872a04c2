"""Context parallelism: one microbatch's stream split over ranks, as a pure function.

The stream is cut into 2n chunks for n ranks, and rank r takes chunks r and 2n - 1 - r (zigzag): in
a long causal sequence later tokens see more keys, and this gives every rank the same share of them
(a contiguous split would leave the last rank up to twice the mean). Queries stay; keys and values
are gathered, so key ranges count in the gathered order: rank by rank, each its two chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spmdrl.models.spans import Range, Span
from spmdrl.training.packing import Microbatch


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalStream:
    """What one rank computes of a microbatch.

    Args:
        tokens, positions: int64 [L], this rank's part, equally long on all ranks.
        source: int64 [L], the tokens' places in the batch's token columns, -1 where they have none.
        spans: rows count here, keys in the gathered stream.
        predict, targets: int64 [M], the loss tokens predicted here, padded to the most that any
            rank has (at least 1).
        read: int64, which of the microbatch's loss tokens the first of these are, in order.
        order: int64 [N], where each of the microbatch's loss tokens stands among the ranks' parts
            laid end to end; None where there is one rank, and all are in order.
    """

    tokens: Tensor
    positions: Tensor
    source: Tensor
    spans: tuple[Span, ...]
    predict: Tensor
    targets: Tensor
    read: Tensor
    order: Tensor | None


def split_stream(microbatch: Microbatch, rank: int, size: int) -> LocalStream:
    """Rank `rank`'s part of the stream, of `size` ranks."""
    if size == 1:
        return LocalStream(
            tokens=microbatch.tokens,
            positions=microbatch.positions,
            source=microbatch.origin,
            spans=microbatch.spans,
            predict=microbatch.predict,
            targets=microbatch.targets,
            read=torch.arange(len(microbatch.predict)),
            order=None,
        )
    length = len(microbatch.tokens)
    chunk = -(-length // (2 * size))
    padded = 2 * size * chunk
    spans = list(microbatch.spans)
    if padded > length:
        spans.append(Span(q_start=length, q_stop=padded, own=(length, padded)))
    chunks = (rank, 2 * size - 1 - rank)
    places = torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in chunks])
    part = places.clamp(max=length - 1)  # padding repeats a token; nothing reads what it gives
    gathered = _gathered(microbatch.predict, chunk, size)
    owner, place = gathered // (2 * chunk), gathered % (2 * chunk)
    counts = torch.bincount(owner, minlength=size)
    most = max(1, int(counts.max()))
    mine = (owner == rank).nonzero().flatten()
    padding = torch.zeros(most - len(mine), dtype=torch.int64)
    order = torch.empty_like(owner)
    for r in range(size):
        order[owner == r] = r * most + torch.arange(int(counts[r]))
    return LocalStream(
        tokens=microbatch.tokens[part],
        positions=microbatch.positions[part],
        source=microbatch.origin[part],
        spans=_split_spans(spans, chunks, chunk, size),
        predict=torch.cat((place[mine], padding)),
        targets=torch.cat((microbatch.targets[mine], padding)),
        read=mine,
        order=order,
    )


def stream_part(stream: LocalStream, first: int, last: int) -> LocalStream:
    """Tokens `[first, last)` of it, for what concerns tokens alone: sources, and the places there
    that are read, counted from `first`.
    """
    predict = stream.predict[: len(stream.read)]
    inside = (predict >= first) & (predict < last)
    return replace(
        stream,
        source=stream.source[first:last],
        predict=predict[inside] - first,
        read=stream.read[inside],
    )


def _gathered(places: Tensor, chunk: int, size: int) -> Tensor:
    """Places in the stream as places in the gathered stream."""
    number, within = places // chunk, places % chunk
    late = number >= size
    owner = torch.where(late, 2 * size - 1 - number, number)
    return owner * 2 * chunk + late * chunk + within


def _split_spans(
    spans: Sequence[Span], chunks: tuple[int, int], chunk: int, size: int
) -> tuple[Span, ...]:
    result = []
    for half, number in enumerate(chunks):
        first, last = number * chunk, (number + 1) * chunk
        shift = half * chunk - first
        for span in spans:
            start, stop = max(span.q_start, first), min(span.q_stop, last)
            if start >= stop:
                continue
            assert span.own == (span.q_start, span.q_stop), "a stream's own keys are its own rows"
            before = (*span.prefix, (span.own[0], start))
            own = _gathered_ranges((start, stop), chunk, size)
            result.append(
                Span(
                    q_start=start + shift,
                    q_stop=stop + shift,
                    own=own[0],
                    prefix=tuple(r for keys in before for r in _gathered_ranges(keys, chunk, size)),
                )
            )
    return tuple(result)


def _gathered_ranges(keys: Range, chunk: int, size: int) -> list[Range]:
    """A range of the stream as ranges of the gathered stream, cut where chunks end."""
    result = []
    start, stop = keys
    while start < stop:
        end = min(stop, (start // chunk + 1) * chunk)
        first = int(_gathered(torch.tensor(start), chunk, size))
        result.append((first, first + end - start))
        start = end
    return result
