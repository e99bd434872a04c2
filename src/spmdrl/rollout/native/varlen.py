"""Paged attention by torch's FlashAttention kernels (`varlen_attn` with a block table), on CUDA.

Decodes and prompt chunks of a step go through one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from spmdrl.rollout.native.attention import CacheShape
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
        max_blocks: most blocks of one sample.
        kernel: torch's `varlen_attn`, or its replacement in a test without a GPU.
    """

    def __init__(
        self, shape: CacheShape, *, max_blocks: int, kernel: Callable[..., Any] | None = None
    ) -> None:
        self._kernel = kernel or varlen_attn()
        self._shape, self._max_blocks = shape, max_blocks
        layers = (shape.num_layers, shape.num_blocks + 1, shape.block_size)
        # Zeros, because the kernel may multiply values behind a sample's end by weights of zero.
        zeros = partial(torch.zeros, dtype=shape.dtype, device=shape.device)
        self._keys = zeros(*layers, shape.kv_heads, shape.head_dim).unbind(0)
        self._values = zeros(*layers, shape.kv_heads, shape.head_dim).unbind(0)
        self._indices: Sequence[Tensor] = ()
        self._max_query = 0

    def indices(self, plan: StepPlan, *, pad_to: int = 0) -> list[Tensor]:
        """See `PagedAttention.indices`.

        Args:
            pad_to: pad to this many samples, with idle ones; all shapes depend on it only.
        """
        size, trash = self._shape.block_size, self._shape.num_blocks
        spans = [(s.blocks, s.cached - 1, s.cached) for s in plan.decodes]
        spans += [(c.sample.blocks, c.start, c.stop) for c in plan.chunks]
        spans += [([trash], 0, 1)] * (pad_to - len(spans))
        slots = [
            blocks[i // size] * size + i % size
            for blocks, start, stop in spans
            for i in range(start, stop)
        ]
        width = max(len(blocks) for blocks, _, _ in spans)
        table = torch.zeros(len(spans), self._max_blocks if pad_to else width, dtype=torch.int32)
        table[:, :width] = torch.tensor(
            [blocks + [trash] * (width - len(blocks)) for blocks, _, _ in spans], dtype=torch.int32
        )
        used = [stop for _, _, stop in spans]
        starts = [0, *accumulate(stop - start for _, start, stop in spans)]
        lengths = (
            torch.tensor(x, dtype=torch.int32) for x in (used, starts, [0, *accumulate(used)])
        )
        return [torch.tensor(slots), table, *lengths]

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        self._indices = indices
        self._max_query = max((c.stop - c.start for c in plan.chunks), default=1)

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
        slots, table, used, starts, key_starts = self._indices
        keys.flatten(0, 1).index_copy_(0, slots, k)
        values.flatten(0, 1).index_copy_(0, slots, v)
        # FlashAttention 2 requires lengths of keys although a block table makes them useless;
        # 3 and later refuse both together.
        old = current_flash_attention_impl() in (None, "FA2")
        single = self._max_query == 1
        out = self._kernel(
            q if single and old else q.contiguous(),
            keys,
            values,
            starts,
            key_starts if old else None,
            self._max_query,
            self._max_blocks * self._shape.block_size,
            # A single query sees all keys. FlashAttention 2 reads them once for all heads of a
            # group only if no window is given, not even a causal one.
            window_size=(-1, -1) if single else (-1, 0),
            enable_gqa=True,
            seqused_k=used,
            block_table=table,
            # Split keys give wrong rows with block tables (issue 194167 of pytorch), and without
            # splits a row's result does not depend on the batch.
            num_splits=1,
        )
        assert isinstance(out, Tensor)
        return out
