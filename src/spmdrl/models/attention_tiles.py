"""Attention of spans as batched tiles, for any device: kernels `blocked` and `sdpa`.

Spans are cut into pieces of few query rows (each sees keys up to its own end only, so little masked
work is done), and pieces of like shape are padded to one shape and computed in one batch. The
backward recomputes each tile and accumulates into one gradient tensor per input: its cost is
proportional to the tokens, where autograd through slices would touch every token once per span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import AttentionFunction, Range, Span

BLOCK_ROWS = 64
"""Query rows per piece of the explicit kernel."""
MAX_SCORES = 1 << 16
"""Scores per head in one tile: with 9 heads in float32 about 2.4 MB, near a core's cache."""
PAD_RATIO, PAD_FLOOR = 0.25, 1024
"""A piece joins a tile if padding adds at most this share of its scores, or this many."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Query rows and, in order, the ranges of all keys that the last row sees."""

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
        rows: which row of q is at each of the S * Q places (a slice where S is 1).
        keys: which row of k is at each of the S * K places.
        mask: [S or 1, Q, K], 0 or -inf, added to the scores; None: nothing is masked.
        causal: the mask is the plain causal one of a square tile.
        places, live_rows, live: None without padding, else the places that are no padding, their
            rows of q, and 1 or 0 for every place [S * Q, 1, 1].
    """

    size: tuple[int, int, int]
    rows: slice | Tensor
    keys: slice | Tensor
    mask: Tensor | None
    causal: bool
    places: Tensor | None = None
    live_rows: Tensor | None = None
    live: Tensor | None = None


class TiledKernel:
    """Tiles by explicit products (`explicit`) or by `scaled_dot_product_attention`."""

    def __init__(self, *, explicit: bool) -> None:
        self._explicit = explicit

    def prepare(
        self, spans: Sequence[Span], *, dtype: torch.dtype, device: torch.device
    ) -> AttentionFunction:
        pieces = cut(spans, BLOCK_ROWS if self._explicit else None)
        tiles = tuple(make_tile(group, dtype, device) for group in group_pieces(pieces))
        explicit = self._explicit

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = _Tiled.apply(q, k, v, tiles, explicit)  # type: ignore[no-untyped-call]
            return out

        return attend


def cut(spans: Sequence[Span], block_rows: int | None) -> list[Piece]:
    """Spans as pieces of at most `block_rows` query rows (None: uncut), keys cut at their end."""
    pieces = []
    for span in spans:
        size = block_rows or span.num_queries
        for start in range(span.q_start, span.q_stop, size):
            stop = min(start + size, span.q_stop)
            keys = _first(span.keys, span.num_keys - (span.q_stop - stop))
            pieces.append(Piece(rows=(start, stop), keys=keys))
    return pieces


def _first(ranges: Sequence[Range], count: int) -> tuple[Range, ...]:
    """The first `count` indices of the ranges, neighbours joined."""
    result: list[Range] = []
    for start, stop in ranges:
        stop = min(stop, start + count)
        count -= stop - start
        if stop <= start:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def group_pieces(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are computed together, of like shape, in a fixed order."""
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


def make_tile(pieces: Sequence[Piece], dtype: torch.dtype, device: torch.device) -> Tile:
    count = len(pieces)
    queries = torch.tensor([p.num_queries for p in pieces])
    keys = torch.tensor([p.num_keys for p in pieces])
    num_q, num_k = int(queries.max()), int(keys.max())
    equal = bool((queries == num_q).all() and (keys == num_k).all())
    kinds = 1 if equal else count
    limit = (keys - queries + 1)[:kinds, None] + torch.arange(num_q)  # [kinds, Q]
    hidden = torch.arange(num_k) >= limit[..., None]
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
        causal=mask is not None and equal and num_q == num_k,
        places=places.nonzero().flatten().to(device) if padded else None,
        live_rows=live_rows.to(device) if padded and live_rows is not None else None,
        live=places.to(device, dtype)[:, None, None] if padded else None,
    )


def _places(ranges: Sequence[Sequence[Range]], width: int) -> slice | Tensor:
    """The row at each place, every piece padded to `width` with its own first row."""
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


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], explicit: bool
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for tile in tiles:
            q_tile, k_tile, v_tile = _inputs(q, k, v, tile)
            if explicit:
                part = torch.bmm(_probabilities(q_tile, k_tile, tile), v_tile)
            else:
                part = _sdpa(q_tile, k_tile, v_tile, tile)
            _put_rows(out, part, tile)
        ctx.save_for_backward(q, k, v, out)
        ctx.tiles, ctx.explicit = tiles, explicit
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Many tiles may add to one key: a sum of bfloat16 terms would lose the small ones.
        wide = torch.promote_types(k.dtype, torch.float32)
        d_k = torch.zeros(k.shape, dtype=wide, device=k.device)
        d_v = torch.zeros(v.shape, dtype=wide, device=v.device)
        # sum_j p_ij dp_ij = do_i . o_i (Dao et al. 2022, https://arxiv.org/abs/2205.14135, eq. 4)
        delta = (grad * out).sum(-1, keepdim=True) if ctx.explicit else None
        for tile in ctx.tiles:
            q_tile, k_tile, v_tile = _inputs(q, k, v, tile)
            d_out = _fold(grad, tile, k.shape[1], zero_padding=True)
            if delta is not None:
                tile_delta = _fold(delta, tile, k.shape[1], zero_padding=True)
                d_tile = _explicit_backward(q_tile, k_tile, v_tile, tile, d_out, tile_delta)
            else:
                d_tile = _sdpa_backward(q_tile, k_tile, v_tile, tile, d_out)
            _put_rows(d_q, d_tile[0], tile)
            _add_keys(d_k, d_tile[1], tile)
            _add_keys(d_v, d_tile[2], tile)
        d_q.mul_(q.shape[-1] ** -0.5)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _inputs(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """q [S KVH, G Q, d], scaled, and k, v [S KVH, K, d] of a tile; G query heads per kv head.

    Rows of the query heads that share a kv head are folded together: keys are never repeated.
    """
    folded = _fold(q, tile, k.shape[1]) * q.shape[-1] ** -0.5
    return folded, _fold_keys(k, tile), _fold_keys(v, tile)


def _take(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _fold(x: Tensor, tile: Tile, kv_heads: int, *, zero_padding: bool = False) -> Tensor:
    """[T, H, e] -> [S KVH, G Q, e]"""
    count, num_q, _ = tile.size
    rows = _take(x, tile.rows)
    if zero_padding and tile.live is not None:
        rows = rows * tile.live
    rows = rows.reshape(count, num_q, kv_heads, -1, x.shape[-1]).permute(0, 2, 3, 1, 4)
    return rows.reshape(count * kv_heads, -1, x.shape[-1])


def _fold_keys(x: Tensor, tile: Tile) -> Tensor:
    """[T, KVH, d] -> [S KVH, K, d]; a view where the tile is one contiguous piece."""
    count, _, num_k = tile.size
    rows = _take(x, tile.keys)
    return rows.reshape(count, num_k, *x.shape[1:]).transpose(1, 2).flatten(0, 1)


def _put_rows(out: Tensor, part: Tensor, tile: Tile) -> None:
    """Write [S KVH, G Q, d] to the tile's rows of `out` [T, H, d]."""
    count, num_q, _ = tile.size
    kv_heads = part.shape[0] // count
    rows = part.view(count, kv_heads, -1, num_q, part.shape[-1]).permute(0, 3, 1, 2, 4)
    if isinstance(tile.rows, slice):
        out[tile.rows].view(rows.shape).copy_(rows)
        return
    rows = rows.reshape(count * num_q, *out.shape[1:])
    if tile.places is None or tile.live_rows is None:
        out.index_copy_(0, tile.rows, rows)
    else:
        out.index_copy_(0, tile.live_rows, rows.index_select(0, tile.places))


def _add_keys(total: Tensor, part: Tensor, tile: Tile) -> None:
    """Add [S KVH, K, d] to the tile's rows of `total` [T, KVH, d]."""
    count, _, num_k = tile.size
    rows = part.view(count, -1, num_k, part.shape[-1]).transpose(1, 2).flatten(0, 1)
    if isinstance(tile.keys, slice):
        total[tile.keys].add_(rows)
    else:
        total.index_add_(0, tile.keys, rows.to(total.dtype))


def _probabilities(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """softmax(q k^T + mask): [S KVH, G Q, K]"""
    scores = torch.bmm(q, k.transpose(1, 2))
    if tile.mask is not None:
        count, num_q, num_k = tile.size
        scores.view(count, -1, num_q, num_k).add_(tile.mask[:, None])
    return torch.softmax(scores, dim=-1)


def _explicit_backward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, d_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    p = _probabilities(q, k, tile)
    d_v = torch.bmm(p.transpose(1, 2), d_out)
    d_scores = torch.bmm(d_out, v.transpose(1, 2)).sub_(delta).mul_(p)
    return torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q), d_v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> Tensor:
    count, num_q, num_k = tile.size
    kv_heads = q.shape[0] // count
    rows = q.view(q.shape[0], -1, num_q, q.shape[-1])
    # Stride 0 over the query heads of a kv head: equal head counts without a copy.
    k, v = (x[:, None].expand(-1, rows.shape[1], -1, -1) for x in (k, v))
    if tile.causal:
        out = F.scaled_dot_product_attention(rows, k, v, is_causal=True, scale=1.0)
        return out.reshape(q.shape)
    mask = tile.mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[:, None].expand(-1, kv_heads, -1, -1).reshape(-1, 1, num_q, num_k)
    elif mask is not None:
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=1.0)
    return out.reshape(q.shape)


def _sdpa_backward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        d_q, d_k, d_v = torch.autograd.grad(_sdpa(q, k, v, tile), (q, k, v), d_out)
    return d_q, d_k, d_v
