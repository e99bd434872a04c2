"""Paged attention on the CPU by a kernel compiled for the cache's shape: `paged_decode.c`.

Blocks are read in place: nothing is gathered.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.kernels import c_code
from spmdrl.rollout.native.attention import CacheShape, GatheredAttention

_I, _F, _P, _N = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int

_MAX_STACK_BYTES = 1 << 18
"""Limit of the kernel's frame, which holds a block's scores: OpenMP threads may have only 2 MB."""


class CompiledAttention(GatheredAttention):
    """`GatheredAttention` with one kernel for its decode steps, and one for writes to the cache.

    Raises:
        ValueError: `compiled_code` has no kernels for the shape.
    """

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        code = compiled_code(shape)
        if code is None:
            raise ValueError(f"no compiled attention for {shape} here")
        self._store_tokens, self._paged_decode = code.store_tokens, code.paged_decode
        self._store_tokens.argtypes = (_P, _I, _P, _I, _P, _P, _I, _I, _P, _P)
        self._paged_decode.argtypes = (_P, _I, _P, _P, _P, _I, _P, _I, _I, _F, _P, _N)
        self._store_tokens.restype = self._paged_decode.restype = None

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert self._slots is not None
        blocks, offsets = self._slots
        k, v = _side_by_side(k), _side_by_side(v)
        self._store_tokens(
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            blocks.data_ptr(),
            offsets.data_ptr(),
            k.shape[0],
            k.shape[1],
            self._keys[layer].data_ptr(),
            self._values[layer].data_ptr(),
        )

    def _attend_decodes(self, layer: int, q: Tensor) -> Tensor:
        q, shape = _side_by_side(q), self._shape
        out = q.new_empty(q.shape)
        self._paged_decode(
            q.data_ptr(),
            q.stride(0),
            self._keys[layer].data_ptr(),
            self._values[layer].data_ptr(),
            self._table.data_ptr(),
            self._table.shape[1],
            self._lengths.data_ptr(),
            q.shape[0],
            shape.kv_heads,
            self._scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def compiled_code(shape: CacheShape) -> ctypes.CDLL | None:
    """Compile the kernels for a cache; None unless a compiler exists and the cache is float32 on a
    CPU, of sizes that the kernels support."""
    if shape.device.type != "cpu" or shape.dtype != torch.float32:
        return None
    if shape.head_dim % 4 or shape.block_size % 4:
        return None
    if shape.group * (shape.block_size + shape.head_dim) * 4 > _MAX_STACK_BYTES:
        return None
    return c_code.load(
        Path(__file__).with_name("paged_decode.c"),
        HEAD_DIM=shape.head_dim,
        GROUP=shape.group,
        BLOCK=shape.block_size,
    )


def _side_by_side(x: Tensor) -> Tensor:  # [T, heads, d]
    """Make the heads of a row contiguous; there may be gaps between rows."""
    dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()
