"""Paged attention on the CPU by kernels compiled for the cache's shape: `paged_decode.c`.

Blocks are read in place: nothing is gathered.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.kernels import c_code
from spmdrl.rollout.native.attention import GatheredAttention
from spmdrl.rollout.native.cache import CacheShape, LayerCache

_I, _F, _P, _N = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int

_MAX_STACK_BYTES = 1 << 18
"""Limit of the kernel's frame, which holds a block's scores: OpenMP threads may have only 2 MB."""


class CompiledAttention(GatheredAttention):
    """`GatheredAttention` with one kernel for a layer's decode steps, and one for its writes to the
    cache. Layers that `compiled_code` has no kernels for (latent caches) are served by torch.

    Raises:
        ValueError: `compiled_code` has kernels for none of the layers.
    """

    def __init__(self, shape: CacheShape) -> None:
        super().__init__(shape)
        self._code: dict[int, ctypes.CDLL] = {}
        for number, layer in shape.cached():
            code = compiled_code(layer, shape)
            if code is not None:
                self._code[number] = code
                code.store_tokens.argtypes = (_P, _I, _P, _I, _P, _I, _I, _P, _P)
                code.paged_decode.argtypes = (
                    *(_P, _I, _P, _P, _P, _I, _P, _I, _I),
                    *(_F, _I, _F, _P, _P, _N),
                )
                code.store_tokens.restype = code.paged_decode.restype = None
        if not self._code:
            raise ValueError(f"no compiled attention for {shape} here")

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        code = self._code.get(layer)
        if code is None:
            super()._store(layer, k, v)
            return
        k, v = _side_by_side(k), _side_by_side(v)
        code.store_tokens(
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            self._cells.data_ptr(),
            k.shape[0],
            k.shape[1],
            self._keys[layer].data_ptr(),
            self._values[layer].data_ptr(),
        )

    def _attend_decodes(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        code = self._code.get(layer)
        if code is None:
            return super()._attend_decodes(layer, q, sinks)
        q, found = _side_by_side(q), self._layer(layer)
        options = found.options
        sinks = None if sinks is None else sinks.float().contiguous()
        out = q.new_empty(q.shape)
        code.paged_decode(
            q.data_ptr(),
            q.stride(0),
            self._keys[layer].data_ptr(),
            self._values[layer].data_ptr(),
            self._table.data_ptr(),
            self._table.stride(0),
            self._positions.data_ptr(),
            q.shape[0],
            found.kv_heads,
            options.scale,
            options.window or 0,
            options.softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def has_compiled_code(shape: CacheShape) -> bool:
    """Whether `CompiledAttention` can be made."""
    return any(compiled_code(layer, shape) is not None for _, layer in shape.cached())


def compiled_code(layer: LayerCache, shape: CacheShape) -> ctypes.CDLL | None:
    """Compile the kernels for a layer's cache, once for layers of one size; None unless a compiler
    exists and the cache is float32 on a CPU, of sizes that the kernels support."""
    if shape.device.type != "cpu" or shape.dtype != torch.float32:
        return None
    if layer.values_in_keys or layer.key_width != layer.value_width:
        return None
    if layer.key_width % 4 or shape.block_size % 4:
        return None
    if layer.group * (shape.block_size + layer.key_width) * 4 > _MAX_STACK_BYTES:
        return None
    return c_code.load(
        Path(__file__).with_name("paged_decode.c"),
        HEAD_DIM=layer.key_width,
        GROUP=layer.group,
        BLOCK=shape.block_size,
    )


def _side_by_side(x: Tensor) -> Tensor:  # [T, heads, d]
    """Make the heads of a row contiguous; there may be gaps between rows."""
    dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()
