"""Paged attention by torch's FlashAttention kernels (`varlen_attn` with a block table), on CUDA.

Decodes and prompt chunks of a step go through one call. Every index is in a permanent buffer, so
that a CUDA graph captured over a decode step finds it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from spmdrl.rollout.native.attention import CacheShape, copy_blocks
from spmdrl.rollout.native.scheduler import StepPlan

BLOCK_MULTIPLE = 256
"""FlashAttention 2 reads pages whose size is a multiple of this."""


def varlen_is_usable(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether the installed torch supports pages (from 2.12), and its kernels these tensors."""
    if device.type != "cuda":
        return False
    paged = {"block_table", "seqused_k", "enable_gqa", "num_splits"}
    if not paged <= inspect.signature(varlen_attn()).parameters.keys():
        return False
    major, _ = torch.cuda.get_device_capability(device)
    fits = head_dim <= 256 and head_dim % 8 == 0
    return major >= 8 and dtype in (torch.float16, torch.bfloat16) and fits


def varlen_attn() -> Callable[..., Any]:
    """Return torch's kernel, imported late: torch's compiler comes with it and takes a second."""
    from torch.nn.attention import varlen

    kernel: Callable[..., Any] = varlen.varlen_attn
    return kernel


class VarlenAttention:
    """`PagedAttention` over caches `[num_blocks + 1, block_size, KVH, d]` per layer.

    Padded rows write into the last block.

    Args:
        max_sequences: most samples in a step.
        max_blocks: most blocks of one sample.
        max_tokens: most rows in a step.
        kernel: torch's `varlen_attn`, or its replacement in a test without a GPU.
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        max_sequences: int,
        max_blocks: int,
        max_tokens: int,
        kernel: Callable[..., Any] | None = None,
    ) -> None:
        self._kernel = kernel or varlen_attn()
        self._shape = shape
        layers = (shape.num_layers, shape.num_blocks + 1, shape.block_size)
        heads = (shape.kv_heads, shape.head_dim)
        # Zeros, because the kernel may multiply values behind a sample's end by weights of zero.
        self._keys = self._zeros(*layers, *heads, dtype=shape.dtype).unbind(0)
        self._values = self._zeros(*layers, *heads, dtype=shape.dtype).unbind(0)
        self._table = self._zeros(max_sequences, max_blocks, dtype=torch.int32)
        self._used = self._zeros(max_sequences, dtype=torch.int32)
        self._starts = self._zeros(max_sequences + 1, dtype=torch.int32)
        self._key_starts = self._zeros(max_sequences + 1, dtype=torch.int32)
        self._slots = self._zeros(max_tokens, dtype=torch.int64)
        self._num_sequences = self._num_tokens = self._max_query = 0

    def prepare(self, plan: StepPlan, *, pad_to: int = 0) -> None:
        """Fill the buffers; `pad_to` is the number of samples to which idle ones pad the step."""
        copy_blocks(plan.copies, (*self._keys, *self._values))
        size, trash = self._shape.block_size, self._shape.num_blocks
        tables = [s.blocks for s in plan.decodes] + [c.sample.blocks for c in plan.chunks]
        used = [s.cached for s in plan.decodes] + [c.stop for c in plan.chunks]
        counts = [1] * len(plan.decodes) + [c.stop - c.start for c in plan.chunks]
        slots = [
            s.blocks[(s.cached - 1) // size] * size + (s.cached - 1) % size for s in plan.decodes
        ]
        for c in plan.chunks:
            slots += [c.sample.blocks[i // size] * size + i % size for i in range(c.start, c.stop)]
        for _ in range(pad_to - len(counts)):
            tables.append([trash])
            used.append(1)
            counts.append(1)
            slots.append(trash * size)
        width = max(len(table) for table in tables)
        padded = [table + [trash] * (width - len(table)) for table in tables]
        n = len(counts)
        self._fill(self._table[:n, :width], padded)
        self._fill(self._used[:n], used)
        self._fill(self._starts[: n + 1], [0, *accumulate(counts)])
        self._fill(self._key_starts[: n + 1], [0, *accumulate(used)])
        self._fill(self._slots[: len(slots)], slots)
        self._num_sequences, self._num_tokens = n, len(slots)
        self._max_query = max(counts)

    def caches(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self._keys, self._values

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [T, H, d]
        k: Tensor,  # [T, KVH, d]
        v: Tensor,  # [T, KVH, d]
    ) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        slots, n = self._slots[: self._num_tokens], self._num_sequences
        keys.flatten(0, 1).index_copy_(0, slots, k)
        values.flatten(0, 1).index_copy_(0, slots, v)
        # FlashAttention 2 requires lengths of keys although a block table makes them useless;
        # 3 and later refuse both together.
        old = current_flash_attention_impl() in (None, "FA2")
        out = self._kernel(
            q.contiguous(),
            keys,
            values,
            self._starts[: n + 1],
            self._key_starts[: n + 1] if old else None,
            self._max_query,
            self._table.shape[1] * self._shape.block_size,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=self._used[:n],
            block_table=self._table[:n],
            # Split keys give wrong rows with block tables (issue 194167 of pytorch), and without
            # splits a row's result does not depend on the batch.
            num_splits=1,
        )
        assert isinstance(out, Tensor)
        return out

    def _zeros(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*sizes, dtype=dtype, device=self._shape.device)

    def _fill(self, target: Tensor, values: Sequence[int] | Sequence[Sequence[int]]) -> None:
        source = torch.tensor(values, dtype=target.dtype)
        target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
