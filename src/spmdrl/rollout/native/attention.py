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
from spmdrl.rollout.native.scheduler import Chunk, StepPlan


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of a rank's key-value cache."""

    num_layers: int
    num_blocks: int
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        """Number of query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def num_bytes(self) -> int:
        values = self.num_blocks * self.block_size * self.kv_heads * self.head_dim
        return 2 * self.num_layers * values * self.dtype.itemsize


class PagedAttention(Protocol):
    """Attention over a block cache that it owns; after `prepare` it is the decoder's `Attend`."""

    def indices(self, plan: StepPlan) -> list[Tensor]:
        """Build on the host the indices that all layers use."""

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        """Take the plan's `indices`, which are on the device now."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; rows are one for each of the plan's decodes, then the tokens of its chunks."""

    def caches(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return keys and values by layer, blocks first, to be read and written between steps."""


def copy_blocks(pairs: Sequence[tuple[int, int]], caches: Sequence[Tensor]) -> None:
    """Copy the (source, target) blocks of every cache; all are read before any is written."""
    if pairs:
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


class GatheredAttention:
    """`PagedAttention` without kernels of its own."""

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        layers = (shape.num_layers, shape.num_blocks, shape.kv_heads)
        # Zeros, because a block's unused tail is multiplied by weights of zero. Keys are kept
        # transposed, so that scores of a whole block are sums of contiguous rows.
        self._keys = self._zeros(*layers, shape.head_dim, shape.block_size).unbind(0)
        self._values = self._zeros(*layers, shape.block_size, shape.head_dim).unbind(0)
        self._scale = shape.head_dim**-0.5
        self._slots: tuple[Tensor, Tensor] | None = None
        self._table = self._lengths = torch.empty(0, dtype=torch.int32)
        self._prefill: list[_Prefill] = []
        self._num_decodes = 0

    def indices(self, plan: StepPlan) -> list[Tensor]:
        """See `PagedAttention.indices`: slots, a table for each span with context, the decodes'
        table and lengths.
        """
        size = self._shape.block_size
        held = [
            [c.sample.blocks[: -(-c.start // size)] for c in members]
            for members in _alike(plan.chunks)
            if members[0].start
        ]
        decodes = [s.blocks[: -(-s.cached // size)] for s in plan.decodes]
        width = max(map(len, decodes), default=0)
        padded = [blocks + [0] * (width - len(blocks)) for blocks in decodes]
        lengths = [s.cached for s in plan.decodes]
        return [
            self._find_slots(plan),
            *map(torch.tensor, held),
            torch.tensor(padded, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
        ]

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        slots, *held, self._table, self._lengths = indices
        self._slots = slots[0], slots[1]
        row = self._num_decodes = len(plan.decodes)
        self._prefill, tables = [], iter(held)
        for members in _alike(plan.chunks):
            span = self._span(members, row, tables)
            self._prefill.append(span)
            row = span.stop

    def caches(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
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

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values of the step's tokens into the cache."""
        assert self._slots is not None, "prepare was not called"
        block, offset = self._slots
        self._keys[layer][block, :, :, offset] = k
        self._values[layer][block, :, offset] = v

    def _attend_decodes(self, layer: int, q: Tensor) -> Tensor:  # [n, H, d]
        """Attend for the first rows, one per decode."""
        k, v = self._gather(layer, self._table)
        places = torch.arange(k.shape[2], device=q.device)
        mask = (places < self._lengths[:, None])[:, None, None]
        return F.scaled_dot_product_attention(
            q.unsqueeze(2), k, v, attn_mask=mask, scale=self._scale, enable_gqa=True
        ).squeeze(2)

    def _attend_span(self, span: _Prefill, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count, length, d = span.count, q.shape[0] // span.count, q.shape[2]
        q, k, v = (x.view(count, length, -1, d).transpose(1, 2) for x in (q, k, v))
        if span.blocks is not None:
            before = (x[:, :, : span.context] for x in self._gather(layer, span.blocks))
            k, v = (torch.cat(parts, dim=2) for parts in zip(before, (k, v), strict=True))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=self._scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _gather(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values of the blocks in `table` [n, W]: [n, KVH, W * block_size, d]."""

        def of(cache: Tensor) -> Tensor:  # [blocks, KVH, block_size, d]
            found = cache.index_select(0, table.flatten())
            return found.view(*table.shape, *found.shape[1:]).transpose(1, 2).flatten(2, 3)

        return of(self._keys[layer].mT), of(self._values[layer])

    def _find_slots(self, plan: StepPlan) -> Tensor:
        """Find the block and the offset of every row's key and value, int64 [2, T]."""
        size = self._shape.block_size
        blocks = [s.blocks[(s.cached - 1) // size] for s in plan.decodes]
        offsets = [(s.cached - 1) % size for s in plan.decodes]
        for chunk in plan.chunks:
            places = range(chunk.start, chunk.stop)
            blocks += [chunk.sample.blocks[i // size] for i in places]
            offsets += [i % size for i in places]
        return torch.tensor((blocks, offsets))

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
