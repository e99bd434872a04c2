"""Spans cut into pieces of few query rows, and like pieces padded to one tile.

Each piece has only the keys that its rows see, so little masked work is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.models.spans import Range, Span

BLOCK_ROWS = 64
"""Query rows per piece of the explicit kernel."""
MAX_SCORES = 1 << 15
"""Scores per head in one tile: with 9 heads in float32 about 1.2 MB, within a core's cache."""
PAD_RATIO, PAD_FLOOR = 0.25, 1024
"""Limits of the padding by which a piece joins a tile: a share of its scores, or a number."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Query rows and, in order, the ranges of all keys that any of them sees."""

    rows: Range
    keys: tuple[Range, ...]

    @property
    def num_queries(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def num_keys(self) -> int:
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """S pieces padded to Q query rows and K keys.

    Args:
        rows: the row of q at each of the S * Q places (a slice if S is 1).
        keys: the row of k at each of the S * K places (a slice for one range of one piece).
        mask: [S or 1, Q, K], 0 or -inf, added to the scores; None if nothing is masked.
        causal: whether the mask is the plain causal one of a square tile.
        places, live_rows, live: None without padding; otherwise the places that are not padding,
            their rows of q, and 1 or 0 for every place [S * Q, 1].
    """

    size: tuple[int, int, int]
    rows: slice | Tensor
    keys: slice | Tensor
    mask: Tensor | None
    causal: bool
    places: Tensor | None = None
    live_rows: Tensor | None = None
    live: Tensor | None = None


def cut(spans: Sequence[Span], block_rows: int | None, window: int | None = None) -> list[Piece]:
    """Cut spans into pieces of at most `block_rows` query rows (None: uncut) with their keys.

    Args:
        window: see `AttentionOptions`.
    """
    pieces = []
    for span in spans:
        size = block_rows or span.num_queries
        for start in range(span.q_start, span.q_stop, size):
            stop = min(start + size, span.q_stop)
            last = span.num_keys - (span.q_stop - stop)
            first = 0 if window is None else max(0, last - (stop - start) - window + 1)
            pieces.append(Piece(rows=(start, stop), keys=_section(span.keys, first, last)))
    return pieces


def _section(ranges: Sequence[Range], first: int, last: int) -> tuple[Range, ...]:
    """Return the indices at places `[first, last)` of the ranges, with neighbours joined."""
    result: list[Range] = []
    place = 0
    for start, stop in ranges:
        shift = start - place
        place += stop - start
        start, stop = max(start, first + shift), min(stop, last + shift)
        if stop <= start:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def group_pieces(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield groups of pieces of similar shape to compute together, in a fixed order."""
    ordered = sorted(pieces, key=lambda p: (-p.num_keys, -p.num_queries, p.rows))
    group: list[Piece] = []
    most_queries = most_keys = 0
    for piece in ordered:
        queries, keys = max(most_queries, piece.num_queries), max(most_keys, piece.num_keys)
        scores = piece.num_queries * piece.num_keys
        # Growing the tile pads its earlier pieces too.
        padding = queries * keys * (len(group) + 1) - scores - most_queries * most_keys * len(group)
        joins = padding <= max(PAD_RATIO * scores, PAD_FLOOR)
        if group and not (joins and (len(group) + 1) * queries * keys <= MAX_SCORES):
            yield group
            group, queries, keys = [], piece.num_queries, piece.num_keys
        group.append(piece)
        most_queries, most_keys = queries, keys
    if group:
        yield group


def make_tile(
    pieces: Sequence[Piece],
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> Tile:
    """Pad pieces to one tile, whose mask hides keys after a row's own and before its window."""
    count = len(pieces)
    queries = torch.tensor([p.num_queries for p in pieces])
    keys = torch.tensor([p.num_keys for p in pieces])
    num_q, num_k = int(queries.max()), int(keys.max())
    equal = bool((queries == num_q).all() and (keys == num_k).all())
    kinds = 1 if equal else count
    # rows of padding see what the last row sees: a softmax over no key would be NaN
    row = torch.minimum(torch.arange(num_q), queries[:kinds, None] - 1)
    limit = ((keys - queries + 1)[:kinds, None] + row)[..., None]  # [kinds, Q, 1]
    key = torch.arange(num_k)
    hidden = key >= limit
    if window is not None:
        hidden |= key < limit - window
    mask = None
    if bool(hidden.any()):
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        mask = mask.to(device)
    padded = bool((queries != num_q).any())
    places = (torch.arange(num_q) < queries[:, None]).flatten()
    rows = _places([[p.rows] for p in pieces], num_q)
    live_rows = rows[places] if isinstance(rows, Tensor) else None
    return Tile(
        size=(count, num_q, num_k),
        rows=_to(rows, device),
        keys=_to(_places([p.keys for p in pieces], num_k), device),
        mask=mask,
        causal=mask is not None and equal and num_q == num_k and not _hides(window, num_k),
        places=places.nonzero().flatten().to(device) if padded else None,
        live_rows=live_rows.to(device) if padded and live_rows is not None else None,
        live=places.to(device, dtype)[:, None] if padded else None,
    )


def _hides(window: int | None, num_keys: int) -> bool:
    return window is not None and window < num_keys


def _places(ranges: Sequence[Sequence[Range]], width: int) -> slice | Tensor:
    """Return the row at each place; every piece is padded to `width` with its own first row."""
    if len(ranges) == 1 and len(ranges[0]) == 1:
        return slice(*ranges[0][0])
    parts = []
    for piece in ranges:
        used = sum(stop - start for start, stop in piece)
        parts += [torch.arange(start, stop) for start, stop in piece]
        parts.append(torch.full((width - used,), piece[0][0]))
    return torch.cat(parts)


def _to(rows: slice | Tensor, device: torch.device) -> slice | Tensor:
    return rows if isinstance(rows, slice) else rows.to(device)
