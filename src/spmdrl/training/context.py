"""Context parallelism: the split of a microbatch's stream over ranks, as a pure function.

The stream is cut into 2n chunks for n ranks, and rank r takes chunks r and 2n - 1 - r (zigzag). In
a long causal sequence later tokens see more keys, and this gives every rank the same share of them
(a contiguous split would give the last rank up to twice the mean). Queries stay; keys and values
are gathered, so key ranges are in the gathered order: rank by rank, each rank's two chunks.
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
    """The part of a microbatch that one rank computes.

    Args:
        tokens, positions: int64 [L], this rank's part, equally long on all ranks.
        origin: int64 [L], the tokens' places in the batch's token columns; -1 if they have none.
        spans: rows are places in this part, keys are places in the gathered stream.
        predict, targets: int64 [M], the places read here and their target ids, padded to the most
            that any rank has (at least 1).
        read: int64, the microbatch's loss tokens that the first entries of `predict` are, in order.
        order: int64 [N], the place of each of the microbatch's loss tokens when the ranks' parts
            are laid end to end; None for a single rank, where all are in order.
    """

    tokens: Tensor
    positions: Tensor
    origin: Tensor
    spans: tuple[Span, ...]
    predict: Tensor
    targets: Tensor
    read: Tensor
    order: Tensor | None


def split_stream(microbatch: Microbatch, rank: int, size: int) -> LocalStream:
    """Return the part of the stream that rank `rank` of `size` computes."""
    if size == 1:
        return LocalStream(
            tokens=microbatch.tokens,
            positions=microbatch.positions,
            origin=microbatch.origin,
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
    part = places.clamp(max=length - 1)  # padding repeats a token; nothing reads its result
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
        origin=microbatch.origin[part],
        spans=_split_spans(spans, chunks, chunk, size),
        predict=torch.cat((place[mine], padding)),
        targets=torch.cat((microbatch.targets[mine], padding)),
        read=mine,
        order=order,
    )


def stream_part(stream: LocalStream, first: int, last: int) -> LocalStream:
    """Return the stream with the origins of tokens `[first, last)` only, and the places among them
    that are read, counted from `first`.
    """
    predict = stream.predict[: len(stream.read)]
    inside = (predict >= first) & (predict < last)
    return replace(
        stream,
        origin=stream.origin[first:last],
        predict=predict[inside] - first,
        read=stream.read[inside],
    )


def _gathered(places: Tensor, chunk: int, size: int) -> Tensor:
    """Convert places in the stream to places in the gathered stream."""
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
    """Convert a range of the stream to ranges of the gathered stream, cut at chunk ends."""
    result = []
    start, stop = keys
    while start < stop:
        end = min(stop, (start // chunk + 1) * chunk)
        first = int(_gathered(torch.tensor(start), chunk, size))
        result.append((first, first + end - start))
        start = end
    return result
