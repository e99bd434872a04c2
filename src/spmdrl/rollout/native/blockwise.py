"""Paged attention in plain torch operations, laid out for the CPU; runs on any device.

Decoding reads every block of keys and values once, where it lies: blocks are dense at the two ends
of the pool (`BlockPool`), so batched products run over views of the cache in the blocks' physical
order. Only queries, scores and outputs, which are small, are reordered between that order and the
sequences'. Nothing is gathered or concatenated per layer, and a prompt block that several samples
share is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import CacheShape
from .decode_index import decode_index
from .scheduler import Chunk, StepPlan
from .sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class _Region:
    """Views of the step's buffers for the units of adjacent blocks, and those blocks' units."""

    first: int  # of the cache's [blocks * KVH, ...] views
    stop: int
    mask: Tensor  # [stop - first, 1, block_size]
    query: Tensor  # [stop - first, users * group, d]
    scores: Tensor  # [stop - first, users * group, block_size]
    weights: Tensor  # likewise
    output: Tensor  # [stop - first, users * group, d]


@dataclass(frozen=True, kw_only=True)
class _Decode:
    """A decode step's indices and views, used by all layers."""

    count: int
    query_index: Tensor
    rows: Tensor
    back: Tensor
    query: Tensor
    score_rows: Tensor
    gathered: Tensor
    probabilities: Tensor
    weight_rows: Tensor
    output_rows: Tensor
    regions: list[_Region]


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


class BlockwiseAttention:
    """`PagedAttention` over views of the cache, without kernels of its own.

    `needs_dense`: decoding reads all blocks from a pool's ends to the last used one.
    """

    needs_dense = True

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        layers = (shape.num_layers, shape.num_blocks, shape.kv_heads)
        # Zeros, since a block's unused tail is multiplied by weights of zero. Keys are kept
        # transposed: both products then run over contiguous rows, twice as fast for the scores.
        self._keys = self._zeros(*layers, shape.head_dim, shape.block_size).unbind(0)
        self._values = self._zeros(*layers, shape.block_size, shape.head_dim).unbind(0)
        self._key_units = [keys.flatten(0, 1) for keys in self._keys]
        self._value_units = [values.flatten(0, 1) for values in self._values]
        size = shape.block_size
        ahead = torch.arange(size)[None, :] >= torch.arange(size + 1)[:, None]
        self._tail_masks = torch.zeros(size + 1, size).masked_fill(ahead, -torch.inf)
        self._tail_masks = self._tail_masks.to(shape.device, shape.dtype)
        self._scale = shape.head_dim**-0.5
        self._buffers: dict[str, Tensor] = {}
        self._slots: tuple[Tensor, Tensor] | None = None
        self._decode: _Decode | None = None
        self._prefill: list[_Prefill] = []
        self._num_decodes = 0

    def prepare(self, plan: StepPlan) -> None:
        self._copy_blocks(list(plan.moves.items()))
        self._copy_blocks(plan.copies)
        self._slots = self._find_slots(plan)
        self._num_decodes = len(plan.decodes)
        self._prepare_decodes(plan.decodes)
        self._prefill = self._prepare_prefill(plan.chunks, len(plan.decodes))

    def caches(self) -> tuple[Items[Tensor], Items[Tensor]]:
        return self._keys, self._values

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [T, H, d]
        k: Tensor,  # [T, KVH, d]
        v: Tensor,  # [T, KVH, d]
    ) -> Tensor:
        self._store(layer, k, v)
        n = self._num_decodes
        decoded = self._attend_decodes(layer, q[:n]) if n else None
        if not self._prefill:
            assert decoded is not None
            return decoded
        out = q.new_empty(q.shape)
        if decoded is not None:
            out[:n] = decoded
        for span in self._prefill:
            rows = slice(span.start, span.stop)
            out[rows] = self._attend_span(span, layer, q[rows], k[rows], v[rows])
        return out

    def _prepare_decodes(self, decodes: list[Sequence]) -> None:
        self._decode = self._decode_views(decodes) if decodes else None

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keys and values of the step's tokens into the cache."""
        assert self._slots is not None, "prepare was not called"
        block, offset = self._slots
        self._keys[layer][block, :, :, offset] = k
        self._values[layer][block, :, offset] = v

    def _attend_decodes(self, layer: int, q: Tensor) -> Tensor:
        """Of the first rows, one for each decode."""
        step, shape = self._decode, self._shape
        assert step is not None
        keys, values = self._key_units[layer], self._value_units[layer]
        queries = q.reshape(-1, shape.group * shape.head_dim)
        torch.index_select(queries, 0, step.query_index, out=step.query)
        for r in step.regions:
            torch.baddbmm(r.mask, r.query, keys[r.first : r.stop], alpha=self._scale, out=r.scores)
        torch.index_select(step.score_rows, 0, step.rows.view(-1), out=step.gathered)
        scores = step.gathered.view(step.probabilities.shape)
        if scores.dtype == torch.float32:
            torch.softmax(scores, -1, out=step.probabilities)
        else:
            step.probabilities.copy_(torch.softmax(scores, -1, dtype=torch.float32))
        by_block = step.probabilities.view(-1, shape.block_size)
        torch.index_select(by_block, 0, step.back, out=step.weight_rows)
        for r in step.regions:
            torch.bmm(r.weights, values[r.first : r.stop], out=r.output)
        # The sum over a sequence's blocks: gather and add in one pass.
        out = F.embedding_bag(step.rows, step.output_rows, mode="sum")
        return out.view(step.count, shape.heads, shape.head_dim)

    def _attend_span(self, span: _Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count, length, d = span.count, q.shape[0] // span.count, q.shape[2]
        q, k, v = (x.view(count, length, -1, d).transpose(1, 2) for x in (q, k, v))
        if span.blocks is not None:
            k = torch.cat((self._context(self._keys[layer].mT, span), k), dim=2)
            v = torch.cat((self._context(self._values[layer], span), v), dim=2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=span.mask, is_causal=span.mask is None, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _context(self, cache: Tensor, span: _Prefill) -> Tensor:
        """The cached tokens before the chunks: cache [blocks, KVH, bs, d] -> [count, KVH, n, d]."""
        assert span.blocks is not None
        found = cache.index_select(0, span.blocks.flatten())
        by_chunk = found.view(*span.blocks.shape, *found.shape[1:]).transpose(1, 2)
        return by_chunk.flatten(2, 3)[:, :, : span.context]

    def _copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        if not pairs:
            return
        index = torch.tensor(pairs, device=self._shape.device)
        source, target = index[:, 0], index[:, 1]
        for cache in (*self._keys, *self._values):
            cache.index_copy_(0, target, cache.index_select(0, source))

    def _find_slots(self, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Block and offset of every row's key and value."""
        size = self._shape.block_size
        blocks = [s.blocks[(s.cached - 1) // size] for s in plan.decodes]
        offsets = [(s.cached - 1) % size for s in plan.decodes]
        for chunk in plan.chunks:
            places = range(chunk.start, chunk.stop)
            blocks += [chunk.sequence.blocks[i // size] for i in places]
            offsets += [i % size for i in places]
        found = torch.tensor((blocks, offsets), device=self._shape.device)
        return found[0], found[1]

    def _decode_views(self, decodes: list[Sequence]) -> _Decode:
        shape = self._shape
        size, kv_heads, group, d = shape.block_size, shape.kv_heads, shape.group, shape.head_dim
        index = decode_index(decodes, size, kv_heads, group)
        units, num_rows = index.query.shape[0], index.back.shape[0]
        query = self._buffer("query", units, group * d)
        scores = self._buffer("scores", num_rows + 1, size)
        weights = self._buffer("weights", num_rows, size)
        output = self._buffer("output", num_rows + 1, d)
        # The row that stands for absent blocks: weight zero, output zero.
        scores[-1], output[-1] = -torch.inf, 0
        regions, first_unit = [], 0
        for region in index.regions:
            first, users, count = region.first, region.users, region.valid.size * kv_heads
            mask = self._tail_masks[torch.from_numpy(region.valid).to(shape.device)]
            stop_unit = first_unit + count * users
            rows = slice(first_unit * group, stop_unit * group)
            regions.append(
                _Region(
                    first=first * kv_heads,
                    stop=first * kv_heads + count,
                    mask=mask.repeat_interleave(kv_heads, dim=0)[:, None],
                    query=query[first_unit:stop_unit].view(count, users * group, d),
                    scores=scores[rows].view(count, users * group, size),
                    weights=weights[rows].view(count, users * group, size),
                    output=output[rows].view(count, users * group, d),
                )
            )
            first_unit = stop_unit
        width = index.rows.shape[1]
        return _Decode(
            count=len(decodes),
            query_index=torch.from_numpy(index.query).to(shape.device),
            rows=torch.from_numpy(index.rows).to(shape.device),
            back=torch.from_numpy(index.back).to(shape.device),
            query=query,
            score_rows=scores,
            gathered=self._buffer("gathered", index.rows.size, size),
            probabilities=self._buffer("probabilities", index.rows.shape[0], width * size),
            weight_rows=weights,
            output_rows=output,
            regions=regions,
        )

    def _prepare_prefill(self, chunks: list[Chunk], first_row: int) -> list[_Prefill]:
        """Spans of rows; neighbouring chunks with the same places in their prompts make one."""
        spans, row = [], first_row
        for (start, stop), group in groupby(chunks, key=lambda c: (c.start, c.stop)):
            members = list(group)
            last_row = row + len(members) * (stop - start)
            spans.append(self._span(members, row, last_row))
            row = last_row
        return spans

    def _span(self, chunks: list[Chunk], first_row: int, last_row: int) -> _Prefill:
        start, stop, device = chunks[0].start, chunks[0].stop, self._shape.device
        if not start:
            return _Prefill(start=first_row, stop=last_row, count=len(chunks))
        held = -(-start // self._shape.block_size)
        query = torch.arange(start, stop, device=device)
        return _Prefill(
            start=first_row,
            stop=last_row,
            count=len(chunks),
            context=start,
            blocks=torch.tensor([c.sequence.blocks[:held] for c in chunks], device=device),
            mask=torch.arange(stop, device=device)[None, :] <= query[:, None],
        )

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(*sizes, dtype=self._shape.dtype, device=self._shape.device)

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        """A `[rows, columns]` view of a buffer that is kept and grows by need."""
        held = self._buffers.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._zeros(rows * columns * 5 // 4)
            self._buffers[name] = held
        return held[: rows * columns].view(rows, columns)
