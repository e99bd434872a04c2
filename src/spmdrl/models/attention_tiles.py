"""Attention of spans as batched tiles, for any device: kernels `blocked` and `sdpa`.

Spans are cut into pieces of few query rows. Pieces of similar shape are padded to one shape and
computed in one batch. The backward recomputes each tile and accumulates into one gradient tensor
per input: its cost is proportional to the tokens, while autograd through slices would touch every
token once per span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.models.attention_pieces import BLOCK_ROWS, Tile, cut, group_pieces, make_tile
from spmdrl.models.spans import AttentionFunction, Span
from spmdrl.models.specs import AttentionOptions


class TiledKernel:
    """Kernel of tiles, by explicit products (`explicit`) or `scaled_dot_product_attention`.

    The latter has neither soft caps nor sinks: layers with them are computed by explicit products,
    in float32.
    """

    def __init__(self, *, explicit: bool) -> None:
        self._explicit = explicit

    def prepare(
        self,
        spans: Sequence[Span],
        options: AttentionOptions,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AttentionFunction:
        explicit = self._explicit or options.softcap is not None
        return _TiledFunction(tuple(spans), options, explicit, dtype, device)


class _TiledFunction:
    """An `AttentionFunction`; tiles of each kind are made when first needed."""

    def __init__(
        self,
        spans: tuple[Span, ...],
        options: AttentionOptions,
        explicit: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spans, self._options, self._explicit = spans, options, explicit
        self._dtype, self._device = dtype, device

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        explicit = self._explicit or sinks is not None
        tiles = self._explicit_tiles if explicit else self._fused_tiles
        out: Tensor = _Tiled.apply(  # type: ignore[no-untyped-call]
            q, k, v, sinks, tiles, self._options, explicit
        )
        return out

    @cached_property
    def _explicit_tiles(self) -> tuple[Tile, ...]:
        return self._tiles(BLOCK_ROWS)

    @cached_property
    def _fused_tiles(self) -> tuple[Tile, ...]:
        window = self._options.window
        return self._tiles(None if window is None else max(BLOCK_ROWS, window))

    def _tiles(self, block_rows: int | None) -> tuple[Tile, ...]:
        window = self._options.window
        groups = group_pieces(cut(self._spans, block_rows, window))
        return tuple(make_tile(group, self._dtype, self._device, window) for group in groups)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        tiles: tuple[Tile, ...],
        options: AttentionOptions,
        explicit: bool,
    ) -> Tensor:
        inputs = _Inputs(q, k, v, sinks, options.scale, explicit)
        shape = (*q.shape[:2], v.shape[2])
        out = inputs.q.new_empty(k.shape[1], shape[0], shape[1] // k.shape[1] * shape[2])
        for tile in tiles:
            q_tile, k_tile, v_tile = inputs.take(tile)
            if explicit:
                weights = _weigh(q_tile, k_tile, tile, options.softcap, inputs.take_sinks(tile))
                part = torch.bmm(weights.p, v_tile)
            else:
                part = _sdpa(q_tile, k_tile, v_tile, tile)
            _put_rows(out, part, tile)
        result = _heads_inside(out, shape).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, result)
        ctx.tiles, ctx.options, ctx.explicit = tiles, options, explicit
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out = ctx.saved_tensors
        options: AttentionOptions = ctx.options
        inputs = _Inputs(q, k, v, sinks, options.scale, ctx.explicit)
        kv_heads = k.shape[1]
        d_out = _heads_outside(grad, kv_heads, inputs.q.dtype)
        d_q = torch.empty_like(inputs.q)
        # Many tiles may add to one key: a sum in bfloat16 would lose small terms.
        wide = torch.promote_types(k.dtype, torch.float32)
        d_k, d_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        delta = None
        if ctx.explicit:
            # sum_j p_ij dp_ij = do_i . o_i (Dao et al. 2022, arXiv 2205.14135, eq. 4)
            rows = torch.linalg.vecdot(grad.to(wide), out.to(wide))
            delta = _heads_outside(rows[..., None], kv_heads, wide)
        for tile in ctx.tiles:
            q_tile, k_tile, v_tile = inputs.take(tile)
            d_tile = _take_rows(d_out, tile, v.shape[-1], zero_padding=True)
            if delta is not None:
                delta_tile = _take_rows(delta, tile, 1, zero_padding=True)
                weights = _weigh(
                    q_tile, k_tile, tile, options.softcap, inputs.take_sinks(tile), slope=True
                )
                if d_sinks is not None and weights.sink is not None:
                    _add_sinks(d_sinks, weights.sink * delta_tile, tile)
                parts = _explicit_backward(q_tile, k_tile, v_tile, weights, d_tile, delta_tile)
            else:
                parts = _sdpa_backward(q_tile, k_tile, v_tile, tile, d_tile)
            _put_rows(d_q, parts[0], tile)
            _add_keys(d_k, parts[1], tile)
            _add_keys(d_v, parts[2], tile)
        d_q.mul_(options.scale)
        return (
            _heads_inside(d_q, q.shape).to(q.dtype),
            d_k.to(k.dtype),
            d_v.to(v.dtype),
            None if d_sinks is None else d_sinks.to(sinks.dtype),
            *(None, None, None),
        )


def _heads_outside(x: Tensor, kv_heads: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Rearrange [T, H, e] -> [KVH, T, G e], scaled: the G query heads of a kv head side by side.

    Products then batch over kv heads with G query rows per token, and keys are never repeated.
    """
    source = x.reshape(x.shape[0], kv_heads, -1).transpose(0, 1)
    out = torch.empty(source.shape, dtype=dtype, device=x.device)
    if dtype != x.dtype:
        return out.copy_(source).mul_(scale)
    return out.copy_(source) if scale == 1.0 else torch.mul(source, scale, out=out)


def _heads_inside(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Rearrange [KVH, T, G e] -> [T, H, e]."""
    return x.transpose(0, 1).reshape(shape)


class _Inputs:
    """Inputs q [KVH, T, G d], scaled, and k, v [KVH, T, d]: a tile of each takes one copy.

    For explicit products they are at least float32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        scale: float,
        explicit: bool,
    ) -> None:
        self._head_dim, kv_heads = q.shape[-1], k.shape[1]
        dtype = torch.promote_types(q.dtype, torch.float32) if explicit else q.dtype
        self.q = _heads_outside(q, kv_heads, dtype, scale)
        self._k, self._v = (_heads_outside(x, kv_heads, dtype) for x in (k, v))
        self._sinks = None if sinks is None else sinks.to(dtype).view(kv_heads, 1, 1, -1)

    def take(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Take q [KVH S, Q G, d] and k, v [KVH S, K, d] of a tile; views if they are one range."""
        q = _take_rows(self.q, tile, self._head_dim)
        return q, self._keys(self._k, tile), self._keys(self._v, tile)

    def take_sinks(self, tile: Tile) -> Tensor | None:
        """Take the sinks of a tile's rows, [KVH S, Q G, 1]."""
        if self._sinks is None:
            return None
        count, num_q, _ = tile.size
        kv_heads, _, _, group = self._sinks.shape
        rows = self._sinks.expand(kv_heads, count, num_q, group)
        return rows.reshape(kv_heads * count, num_q * group, 1)

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
    rows = part.reshape(out.shape[0], -1, out.shape[-1])
    if isinstance(tile.rows, slice):
        out[:, tile.rows] = rows
    elif tile.places is None or tile.live_rows is None:
        out.index_copy_(1, tile.rows, rows)
    else:
        out.index_copy_(1, tile.live_rows, rows.index_select(1, tile.places))


def _add_keys(total: Tensor, part: Tensor, tile: Tile) -> None:
    """Add [KVH S, K, d] to the tile's rows of `total` [T, KVH, d]."""
    rows = part.reshape(total.shape[1], -1, part.shape[-1]).transpose(0, 1)
    if isinstance(tile.keys, slice):
        total[tile.keys].add_(rows)
    else:
        # On a CPU this is five times as fast as from the transposed view.
        total.index_add_(0, tile.keys, rows.to(total.dtype).contiguous())


def _add_sinks(total: Tensor, part: Tensor, tile: Tile) -> None:
    """Subtract [KVH S, Q G, 1] from the gradients of sinks [H]: their values are zeros."""
    count, num_q, _ = tile.size
    rows = part.view(-1, count, num_q, part.shape[1] // num_q)
    total.sub_(rows.sum((1, 2)).flatten())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weights:
    """Softmax of a tile's scores.

    Args:
        p: [KVH S, Q G, K].
        slope: derivative of the soft cap at each score; None without a cap.
        sink: probability of the sink of each row [KVH S, Q G, 1]; None without sinks.
    """

    p: Tensor
    slope: Tensor | None = None
    sink: Tensor | None = None


def _weigh(
    q: Tensor,
    k: Tensor,
    tile: Tile,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    slope: bool = False,
) -> _Weights:
    """Compute softmax(cap(q k^T) + mask), with the cap's slope if asked for."""
    scores = torch.bmm(q, k.transpose(1, 2))
    found = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        found = 1 - scores.square() if slope else None
        scores.mul_(softcap)
    if tile.mask is not None:
        count, num_q, num_k = tile.size
        scores.view(-1, count, num_q, q.shape[1] // num_q, num_k).add_(tile.mask[:, :, None])
    if sinks is None:
        return _Weights(p=torch.softmax(scores, dim=-1), slope=found)
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks)
    p, sink = scores.sub_(top).exp_(), (sinks - top).exp_()
    total = p.sum(-1, keepdim=True).add_(sink)
    return _Weights(p=p.div_(total), slope=found, sink=sink.div_(total))


def _explicit_backward(
    q: Tensor, k: Tensor, v: Tensor, weights: _Weights, d_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_v = torch.bmm(weights.p.transpose(1, 2), d_out)
    d_scores = torch.bmm(d_out, v.transpose(1, 2)).sub_(delta).mul_(weights.p)
    if weights.slope is not None:
        d_scores.mul_(weights.slope)
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
    return out.transpose(1, 2).reshape(*q.shape[:2], v.shape[-1])


def _sdpa_backward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        d_q, d_k, d_v = torch.autograd.grad(_sdpa(q, k, v, tile), (q, k, v), d_out)
    return d_q, d_k, d_v
