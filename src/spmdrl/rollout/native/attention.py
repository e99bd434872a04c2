"""The runner's interface to attention over a paged key-value cache.

Paged attention in plain torch operations, on any device and in any dtype.

Every layer gathers a sample's keys and values from the cache's blocks. It is used if nothing can be
compiled, and kernels are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.memory.host_copies import to_device
from spmdrl.models.attention_tiles import TiledKernel
from spmdrl.models.spans import AttentionFunction, Span
from spmdrl.models.specs import AttentionOptions
from spmdrl.rollout.native.cache import CacheShape, LayerCache
from spmdrl.rollout.native.places import chunk_cells, decode_indices
from spmdrl.rollout.native.step_plan import Chunk, StepPlan


class PagedAttention(Protocol):
    """Attention over a block cache that it owns; after `prepare` it is the decoder's `Attend`."""

    @property
    def takes_latents(self) -> bool:
        """See `Attend.takes_latents`."""

    def indices(self, plan: StepPlan) -> list[Tensor]:
        """Build on the host the indices that all layers use: of the decodes their positions [n],
        their cells [n] (see `places`) and the blocks [n, W] that they hold (after their slots, if
        there are recurrent layers), then `chunk_indices`.
        """

    def chunk_indices(self, plan: StepPlan) -> list[Tensor]:
        """Build on the host what is needed of the plan's chunks; nothing if it has none."""

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        """Take the plan's `indices`, which are on the device now."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend; rows are one for each of the plan's decodes, then the tokens of its chunks."""

    def caches(self) -> Sequence[Tensor]:
        """Return the cache's tensors, blocks first, to be read and written between steps."""


def copy_blocks(pairs: Sequence[tuple[int, int]], caches: Sequence[Tensor]) -> None:
    """Copy the (source, target) blocks of every cache; all are read before any is written."""
    if pairs and caches:
        source, target = to_device([torch.tensor(pairs).T.contiguous()], caches[0].device)[0]
        for cache in caches:
            cache.index_copy_(0, target, cache.index_select(0, source))


@dataclass(frozen=True, kw_only=True)
class _Prefill:
    """Rows `[start, stop)`: `count` chunks of one length, each after `context` cached tokens.

    `blocks` [count, blocks of the context] and `mask` [length, context + length] come with context.
    """

    start: int
    stop: int
    count: int
    context: int = 0
    blocks: Tensor | None = None
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        return (self.stop - self.start) // self.count


@dataclass(frozen=True, kw_only=True)
class _Decodes:
    """Blocks `table` [n, W] that hold the keys which each decode sees, and `mask`
    [n, 1, 1, W * block_size] of these keys.
    """

    table: Tensor
    mask: Tensor


class GatheredAttention:
    """`PagedAttention` without kernels of its own."""

    takes_latents = True

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        # Zeros, because a block's unused tail is multiplied by weights of zero. Keys are kept
        # transposed, so that scores of a whole block are sums of contiguous rows; those that are
        # values too are not.
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for number, layer in shape.cached():
            rows = (shape.num_blocks, layer.kv_heads)
            if layer.values_in_keys:
                self._keys[number] = self._zeros(*rows, shape.block_size, layer.key_width)
                continue
            self._keys[number] = self._zeros(*rows, layer.key_width, shape.block_size)
            self._values[number] = self._zeros(*rows, shape.block_size, layer.value_width)
        half = shape.dtype.itemsize < 4
        self._tiled = TiledKernel(explicit=shape.device.type == "cpu" and not half)
        self._positions = self._cells = torch.empty(0, dtype=torch.int64)
        self._table = torch.empty(0, dtype=torch.int32)
        self._cell_places: tuple[Tensor, Tensor] | None = None  # if a layer has needed them
        self._prefill: list[_Prefill] = []
        self._num_decodes = 0
        # what layers of equal options share, made in a step when the first of them needs it
        self._decodes: dict[int | None, _Decodes] = {}
        self._functions: dict[tuple[int, AttentionOptions], AttentionFunction] = {}

    def indices(self, plan: StepPlan) -> list[Tensor]:
        """See `PagedAttention.indices`."""
        return [*decode_indices(plan, self._shape.block_size), *self.chunk_indices(plan)]

    def chunk_indices(self, plan: StepPlan) -> list[Tensor]:
        """See `PagedAttention.chunk_indices`: cells, then a table for each span with context."""
        if not plan.chunks:
            return []
        size = self._shape.block_size
        held = [
            [c.sample.blocks[: -(-c.start // size)] for c in members]
            for members in _alike(plan.chunks)
            if members[0].start
        ]
        return [chunk_cells(plan, size), *map(torch.tensor, held)]

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        self._positions, self._cells, self._table, *chunked = indices
        self._decodes, self._functions, self._cell_places = {}, {}, None
        row = self._num_decodes = self._positions.shape[0]
        held: list[Tensor] = []
        if chunked:
            self._cells, held = torch.cat((self._cells, chunked[0])), chunked[1:]
        self._prefill, tables = [], iter(held)
        for members in _alike(plan.chunks):
            span = self._span(members, row, tables)
            self._prefill.append(span)
            row = span.stop

    def caches(self) -> Sequence[Tensor]:
        return [*self._keys.values(), *self._values.values()]

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [T, H, d]
        k: Tensor,  # [T, KVH, d]
        v: Tensor,  # [T, KVH, e], unread if they are in the keys
        sinks: Tensor | None = None,  # [H]
    ) -> Tensor:  # [T, H, e]
        self._store(layer, k, v)
        n = self._num_decodes
        decoded = self._attend_decodes(layer, q[:n], sinks) if n else None
        if not self._prefill:
            assert decoded is not None
            return decoded
        out = q.new_empty(*q.shape[:2], self._layer(layer).value_width)
        if decoded is not None:
            out[:n] = decoded
        for span in self._prefill:
            rows = slice(span.start, span.stop)
            out[rows] = self._attend_span(span, layer, q[rows], k[rows], v[rows], sinks)
        return out

    def _layer(self, number: int) -> LayerCache:
        layer = self._shape.layers[number]
        assert layer is not None, f"layer {number} has no cache"
        return layer

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values of the step's tokens into the cache."""
        if self._cell_places is None:
            size = self._shape.block_size
            self._cell_places = self._cells // size, self._cells % size
        block, offset = self._cell_places
        if layer not in self._values:
            self._keys[layer][block, :, offset] = k
            return
        self._keys[layer][block, :, :, offset] = k
        self._values[layer][block, :, offset] = v

    def _attend_decodes(
        self, layer: int, q: Tensor, sinks: Tensor | None = None
    ) -> Tensor:  # [n, H, e]
        """Attend for the first rows, one per decode."""
        found = self._layer(layer)
        window = found.options.window
        if window not in self._decodes:
            self._decodes[window] = self._find_decodes(window)
        decodes = self._decodes[window]
        k, v = self._gather(layer, decodes.table)
        q = q.unsqueeze(2)
        if _is_plain(found, sinks):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=decodes.mask, scale=found.options.scale, enable_gqa=True
            ).squeeze(2)
        return _attend_explicitly(q, k, v, decodes.mask, found.options, sinks).squeeze(2)

    def _find_decodes(self, window: int | None) -> _Decodes:
        """Find the blocks inside the window, and the keys in them that are seen."""
        table, lengths, size = self._table, self._positions[:, None] + 1, self._shape.block_size
        device = table.device
        if window is None:
            places = torch.arange(table.shape[1] * size, device=device)
            return _Decodes(table=table, mask=(places < lengths)[:, None, None])
        # a window that begins anywhere in a block ends in one of this many
        width = min(table.shape[1], (window + size - 2) // size + 1)
        first = (lengths - window).clamp(min=0) // size
        columns = first + torch.arange(width, device=device)
        places = first * size + torch.arange(width * size, device=device)
        return _Decodes(
            table=table.gather(1, columns.clamp(max=table.shape[1] - 1).long()),
            mask=((places < lengths) & (places >= lengths - window))[:, None, None],
        )

    def _attend_span(
        self,
        span: _Prefill,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        found = self._layer(layer)
        window = found.options.window
        hides = window is not None and window < span.context + span.length
        if hides or not _is_plain(found, sinks):
            return self._attend_tiles(span, layer, q, k, v, sinks)
        q, k, v = (x.view(span.count, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if span.blocks is not None:
            before = (x[:, :, : span.context] for x in self._gather(layer, span.blocks))
            k, v = (torch.cat(parts, dim=2) for parts in zip(before, (k, v), strict=True))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=found.options.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _attend_tiles(
        self,
        span: _Prefill,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attend by the trainer's kernel, which computes every option."""
        found, size = self._layer(layer), self._shape.block_size
        window = found.options.window
        if found.values_in_keys:
            v = k[..., : found.value_width]
        # the context's tokens in blocks that no row's window reaches
        skipped = 0 if window is None else max(0, span.context - window + 1) // size
        held = span.context - skipped * size
        if span.blocks is not None and held:
            before = self._gather(layer, span.blocks[:, skipped:])
            k, v = (
                torch.cat(
                    (old[:, :, :held].transpose(1, 2), new.view(span.count, -1, *new.shape[1:])),
                    dim=1,
                ).flatten(0, 1)
                for old, new in zip(before, (k, v), strict=True)
            )
        key = (span.start, found.options)
        if key not in self._functions:
            spans = _rows_and_keys(span.count, span.length, held + span.length)
            self._functions[key] = self._tiled.prepare(
                spans, found.options, dtype=q.dtype, device=q.device
            )
        return self._functions[key](q, k, v, sinks)

    def _gather(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values of the blocks in `table` [n, W]: [n, KVH, W * block_size, d]."""

        def of(cache: Tensor) -> Tensor:  # [blocks, KVH, block_size, d]
            found = cache.index_select(0, table.flatten())
            return found.view(*table.shape, *found.shape[1:]).transpose(1, 2).flatten(2, 3)

        if layer not in self._values:
            keys = of(self._keys[layer])
            return keys, keys[..., : self._layer(layer).value_width]
        return of(self._keys[layer].mT), of(self._values[layer])

    def _span(self, chunks: list[Chunk], first_row: int, tables: Iterator[Tensor]) -> _Prefill:
        start, stop, device = chunks[0].start, chunks[0].stop, self._shape.device
        last_row = first_row + len(chunks) * (stop - start)
        if not start:
            return _Prefill(start=first_row, stop=last_row, count=len(chunks))
        query = torch.arange(start, stop, device=device)
        return _Prefill(
            start=first_row,
            stop=last_row,
            count=len(chunks),
            context=start,
            blocks=next(tables),
            mask=torch.arange(stop, device=device)[None, :] <= query[:, None],
        )

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(*sizes, dtype=self._shape.dtype, device=self._shape.device)


def _alike(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Split chunks into runs at the same places in their prompts, each of which is one span."""
    return [list(run) for _, run in groupby(chunks, key=lambda c: (c.start, c.stop))]


def _is_plain(layer: LayerCache, sinks: Tensor | None) -> bool:
    """Whether torch's fused attention computes the layer, but for its window."""
    return sinks is None and layer.options.softcap is None and not layer.values_in_keys


def _rows_and_keys(count: int, num_queries: int, num_keys: int) -> list[Span]:
    """Lay the rows and the keys of `count` equal chunks end to end."""
    return [
        Span(
            q_start=i * num_queries,
            q_stop=(i + 1) * num_queries,
            own=(i * num_keys, (i + 1) * num_keys),
        )
        for i in range(count)
    ]


def _attend_explicitly(
    q: Tensor,  # [n, H, 1, d]
    k: Tensor,  # [n, KVH, K, d]
    v: Tensor,  # [n, KVH, K, e]
    mask: Tensor,  # [n, 1, 1, K]
    options: AttentionOptions,
    sinks: Tensor | None,  # [H]
) -> Tensor:  # [n, H, 1, e]
    """Attend for single queries with any options, in float32 at least."""
    dtype, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    rows = q.to(dtype).reshape(len(q), kv_heads, -1, q.shape[-1])  # the group's heads as rows
    scores = torch.matmul(rows, k.to(dtype).mT).mul_(options.scale)
    if options.softcap is not None:
        scores = scores.div_(options.softcap).tanh_().mul_(options.softcap)
    scores.masked_fill_(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.to(dtype).view(1, kv_heads, -1, 1).expand(len(q), -1, -1, -1)
        weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    out = torch.matmul(weights, v.to(dtype))
    return out.view(len(q), -1, 1, v.shape[-1]).to(q.dtype)
