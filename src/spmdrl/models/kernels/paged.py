"""Triton's kernels over a paged cache, as engines call them; imported by them without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.blocks.softmax_attention import Turning
from spmdrl.models.kernels import gpu
from spmdrl.models.specs import AttentionOptions


def turn_and_store(
    qkv: Tensor,  # [T, H + 2 KVH, d]
    slots: Tensor,  # [T] int64, each token's place in the cache
    keys: Tensor,  # [blocks, block_size, KVH, d], written
    values: Tensor,  # [blocks, block_size, KVH, d], written
    turning: Turning,
) -> Tensor:  # [T, H, d]
    """Return a layer's queries after norm and rope, and write its keys and values to the cache."""
    from spmdrl.models.kernels.cuda import projected

    rope, q_norm, k_norm = turning.rope, turning.q_norm, turning.k_norm
    return projected.turn_and_store(
        qkv,
        slots,
        keys,
        values,
        cos=None if rope is None else rope.cos,
        sin=None if rope is None else rope.sin,
        interleaved=rope is not None and rope.interleaved,
        q_weight=None if q_norm is None else q_norm.weight,
        k_weight=None if k_norm is None else k_norm.weight,
        eps=0.0 if q_norm is None else q_norm.spec.eps,
        one_plus=q_norm is not None and q_norm.spec.one_plus,
    )


def least_shared_keys(device: torch.device) -> int | None:
    """Return the fewest keys of pages that rows share which `DecodeKernels` reads once for them;
    None where the kernels do not run.
    """
    if not gpu.runs_on(device):
        return None
    from spmdrl.models.kernels.cuda import decode

    return decode.SPLIT


class DecodeKernels:
    """Attention of single queries, with the memory that counts the splits which have ended.

    All calls are of one stream, or of streams that wait for each other, as those of a cache are.
    """

    def __init__(self) -> None:
        # by their number: a captured graph keeps the address of its own
        self._counters: dict[int, Tensor] = {}

    def serves(self, q: Tensor, block_size: int) -> bool:
        """Whether the kernel takes these queries, and blocks of this size."""
        if not gpu.serves(q):
            return False
        from spmdrl.models.kernels.cuda.decode import covers

        return covers(q.shape[2], block_size)

    def __call__(
        self,
        q: Tensor,  # [n, H, d]
        keys: Tensor,  # [blocks, block_size, KVH, d]
        values: Tensor,  # [blocks, block_size, KVH, d]
        table: Tensor,  # [n, W] int32
        lengths: Tensor,  # [n] int32, keys that each query sees, its own included
        options: AttentionOptions,
        sinks: Tensor | None = None,  # [H]
        sharing: Tensor | None = None,  # [4, n] int32
    ) -> Tensor:  # [n, H, d]
        """Compute `kernels.cuda.decode.decode_attention`, or with `sharing` what equals it to the
        last bit, `kernels.cuda.cascade.cascade_attention`.
        """
        q, count = gpu.side_by_side(q), len(q) * keys.shape[2]
        if count not in self._counters:
            self._counters[count] = torch.zeros(count, dtype=torch.int32, device=q.device)
        counters, operands = self._counters[count], (q, keys, values, table, lengths)
        if sharing is None:
            from spmdrl.models.kernels.cuda.decode import decode_attention

            return decode_attention(*operands, options, sinks, counters=counters)
        from spmdrl.models.kernels.cuda.cascade import cascade_attention

        return cascade_attention(*operands, options, sinks, sharing=sharing, counters=counters)
