"""Attention of spans as batched tiles, for any device: kernels `blocked` and `sdpa`.

Spans are cut into pieces of few query rows (each sees keys only up to its own end, so little masked
work is done). Pieces of similar shape are padded to one shape and computed in one batch. The
backward recomputes each tile and accumulates into one gradient tensor per input: its cost is
proportional to the tokens, while autograd through slices would touch every token once per span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.models.spans import AttentionFunction, Range, Span

BLOCK_ROWS = 64
"""Query rows per piece of the explicit kernel."""
MAX_SCORES = 1 << 15
"""Scores per head in one tile: with 9 heads in float32 about 1.2 MB, within a core's cache."""
PAD_RATIO, PAD_FLOOR = 0.25, 1024
"""Limits of the padding by which a piece joins a tile: a share of its scores, or a number."""


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


class TiledKernel:
    """Kernel of tiles, by explicit products (`explicit`) or `scaled_dot_product_attention`."""

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
    """Cut spans into pieces of at most `block_rows` query rows (None: uncut) with their keys."""
    pieces = []
    for span in spans:
        size = block_rows or span.num_queries
        for start in range(span.q_start, span.q_stop, size):
            stop = min(start + size, span.q_stop)
            keys = _first(span.keys, span.num_keys - (span.q_stop - stop))
            pieces.append(Piece(rows=(start, stop), keys=keys))
    return pieces


def _first(ranges: Sequence[Range], count: int) -> tuple[Range, ...]:
    """Return the first `count` indices of the ranges, with neighbours joined."""
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
        live=places.to(device, dtype)[:, None] if padded else None,
    )


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


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], explicit: bool
    ) -> Tensor:
        inputs = _Inputs(q, k, v)
        out = torch.empty_like(inputs.q)
        for tile in tiles:
            q_tile, k_tile, v_tile = inputs.take(tile)
            if explicit:
                part = torch.bmm(_probabilities(q_tile, k_tile, tile), v_tile)
            else:
                part = _sdpa(q_tile, k_tile, v_tile, tile)
            _put_rows(out, part, tile)
        result = _heads_inside(out, q.shape)
        ctx.save_for_backward(q, k, v, result)
        ctx.tiles, ctx.explicit = tiles, explicit
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        inputs = _Inputs(q, k, v)
        kv_heads = k.shape[1]
        d_out = _heads_outside(grad, kv_heads)
        d_q = torch.empty_like(d_out)
        # Many tiles may add to one key: a sum in bfloat16 would lose small terms.
        wide = torch.promote_types(k.dtype, torch.float32)
        d_k, d_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        delta = None
        if ctx.explicit:
            # sum_j p_ij dp_ij = do_i . o_i (Dao et al. 2022, arXiv 2205.14135, eq. 4)
            delta = _heads_outside(torch.linalg.vecdot(grad, out)[..., None], kv_heads)
        for tile in ctx.tiles:
            q_tile, k_tile, v_tile = inputs.take(tile)
            d_tile = _take_rows(d_out, tile, q.shape[-1], zero_padding=True)
            if delta is not None:
                delta_tile = _take_rows(delta, tile, 1, zero_padding=True)
                parts = _explicit_backward(q_tile, k_tile, v_tile, tile, d_tile, delta_tile)
            else:
                parts = _sdpa_backward(q_tile, k_tile, v_tile, tile, d_tile)
            _put_rows(d_q, parts[0], tile)
            _add_keys(d_k, parts[1], tile)
            _add_keys(d_v, parts[2], tile)
        d_q.mul_(q.shape[-1] ** -0.5)
        return _heads_inside(d_q, q.shape), d_k.to(k.dtype), d_v.to(v.dtype), None, None


def _heads_outside(x: Tensor, kv_heads: int, scale: float = 1.0) -> Tensor:
    """Rearrange [T, H, e] -> [KVH, T, G e], scaled: the G query heads of a kv head side by side.

    Products then batch over kv heads with G query rows per token, and keys are never repeated.
    """
    source = x.reshape(x.shape[0], kv_heads, -1).transpose(0, 1)
    out = torch.empty(source.shape, dtype=x.dtype, device=x.device)
    return out.copy_(source) if scale == 1.0 else torch.mul(source, scale, out=out)


def _heads_inside(x: Tensor, shape: torch.Size) -> Tensor:
    """Rearrange [KVH, T, G e] -> [T, H, e]."""
    return x.transpose(0, 1).reshape(shape)


class _Inputs:
    """Inputs q [KVH, T, G d], scaled, and k, v [KVH, T, d]: a tile of each takes one copy."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._head_dim = q.shape[-1]
        self.q = _heads_outside(q, k.shape[1], self._head_dim**-0.5)
        self._k, self._v = (_heads_outside(x, k.shape[1]) for x in (k, v))

    def take(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Take q [KVH S, Q G, d] and k, v [KVH S, K, d] of a tile; views if they are one range."""
        q = _take_rows(self.q, tile, self._head_dim)
        return q, self._keys(self._k, tile), self._keys(self._v, tile)

    def _keys(self, x: Tensor, tile: Tile) -> Tensor:
        return _take(x, tile.keys).reshape(-1, tile.size[2], x.shape[-1])


def _take(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[:, index] if isinstance(index, slice) else x.index_select(1, index)


def _take_rows(x: Tensor, tile: Tile, width: int, *, zero_padding: bool = False) -> Tensor:
    """Take the tile's rows of [KVH, T, G e] as [KVH S, Q G, e]."""
    rows = _take(x, tile.rows)
    if zero_padding and tile.live is not None:
        rows = rows * tile.live
    count, num_q, _ = tile.size
    return rows.reshape(x.shape[0] * count, num_q * (x.shape[-1] // width), width)


def _put_rows(out: Tensor, part: Tensor, tile: Tile) -> None:
    """Write [KVH S, Q G, e] to the tile's rows of `out` [KVH, T, G e]."""
    rows = part.view(out.shape[0], -1, out.shape[-1])
    if isinstance(tile.rows, slice):
        out[:, tile.rows] = rows
    elif tile.places is None or tile.live_rows is None:
        out.index_copy_(1, tile.rows, rows)
    else:
        out.index_copy_(1, tile.live_rows, rows.index_select(1, tile.places))


def _add_keys(total: Tensor, part: Tensor, tile: Tile) -> None:
    """Add [KVH S, K, d] to the tile's rows of `total` [T, KVH, d]."""
    rows = part.view(total.shape[1], -1, part.shape[-1]).transpose(0, 1)
    if isinstance(tile.keys, slice):
        total[tile.keys].add_(rows)
    else:
        # On a CPU this is five times as fast as from the transposed view.
        total.index_add_(0, tile.keys, rows.to(total.dtype).contiguous())


def _probabilities(q: Tensor, k: Tensor, tile: Tile) -> Tensor:
    """Compute softmax(q k^T + mask): [KVH S, Q G, K]."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if tile.mask is not None:
        count, num_q, num_k = tile.size
        scores.view(-1, count, num_q, q.shape[1] // num_q, num_k).add_(tile.mask[:, :, None])
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
    rows = q.unflatten(1, (num_q, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    # Stride 0 over the query heads of a kv head gives equal head counts without a copy.
    k, v = (x[:, None].expand(-1, rows.shape[1], -1, -1) for x in (k, v))
    mask = None if tile.causal else tile.mask
    if mask is not None and mask.shape[0] > 1:
        kv_heads = q.shape[0] // count
        mask = mask.expand(kv_heads, -1, -1, -1).reshape(-1, 1, num_q, num_k)
    elif mask is not None:
        mask = mask[:, None]
    out = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=mask, is_causal=tile.causal, scale=1.0
    )
    return out.transpose(1, 2).reshape(q.shape)


def _sdpa_backward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        d_q, d_k, d_v = torch.autograd.grad(_sdpa(q, k, v, tile), (q, k, v), d_out)
    return d_q, d_k, d_v
