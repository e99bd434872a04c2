"""Paged attention by torch's FlashAttention kernels (`varlen_attn` with a block table), on CUDA.

Decodes and prompt chunks of a step go through one call. Where Triton is installed, the project's
own kernels (`models.kernels.cuda`) compute norms, rope and the cache's write in one launch, and the
attention of steps that only decode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from spmdrl.models.blocks.softmax_attention import Turning
from spmdrl.models.kernels.paged import DecodeKernels, turn_and_store
from spmdrl.models.linear import LEAST_CAPABILITY
from spmdrl.rollout.native.cache import CacheShape, LayerCache
from spmdrl.rollout.native.places import chunk_cells, decode_indices
from spmdrl.rollout.native.step_plan import StepPlan

BLOCK_MULTIPLE = 256
"""FlashAttention 2 reads pages whose size is a multiple of this."""


def varlen_is_usable(
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    capability: tuple[int, int] | None = None,
) -> bool:
    """Whether the installed torch supports pages (from 2.12), and its kernels these tensors.

    Args:
        capability: the GPU's compute capability; by default the device is asked.
    """
    if device.type != "cuda":
        return False
    if not _takes_pages():
        return False
    if capability is None:
        capability = torch.cuda.get_device_capability(device)
    fits = head_dim <= 256 and head_dim % 8 == 0
    return capability >= LEAST_CAPABILITY and dtype in (torch.float16, torch.bfloat16) and fits


@lru_cache(maxsize=1)
def _takes_pages() -> bool:
    """Whether the installed torch's kernel takes pages."""
    paged = {"block_table", "seqused_k", "enable_gqa", "num_splits"}
    return paged <= inspect.signature(varlen_attn()).parameters.keys()


def pages_are_usable(
    layers: Sequence[LayerCache | None],
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int] | None = None,
) -> bool:
    """Whether `VarlenAttention` computes the attention of these layers.

    Args:
        capability: see `varlen_is_usable`.
    """
    found = [layer for layer in layers if layer is not None]
    alike = all(
        layer.options.softcap is None
        and not layer.values_in_keys
        and layer.key_width == layer.value_width
        for layer in found
    )
    widths = {layer.key_width for layer in found}
    usable = [varlen_is_usable(dtype, width, device, capability) for width in widths]
    return alike and bool(usable) and all(usable)


def varlen_attn() -> Callable[..., Any]:
    """Return torch's kernel, imported late: torch's compiler comes with it and takes a second."""
    from torch.nn.attention import varlen

    kernel: Callable[..., Any] = varlen.varlen_attn
    return kernel


def paged_bytes(shape: CacheShape) -> int:
    """Return the bytes of the caches of `VarlenAttention`, which have a block more."""
    return replace(shape, num_blocks=shape.num_blocks + 1).num_bytes


class VarlenAttention:
    """`PagedAttention` over caches `[num_blocks + 1, block_size, KVH, d]` per layer.

    Windows and sinks are supported, soft caps are not (see `pages_are_usable`). Padded rows write
    into the last block.

    Args:
        max_blocks: most blocks of one sample.
        memory: uint8 tensor of `paged_bytes(shape)` at least, in which the caches lie; by default
            each has memory of its own.
        kernel: torch's `varlen_attn`, or its replacement in a test without a GPU.
    """

    takes_latents = False

    def __init__(
        self,
        shape: CacheShape,
        *,
        max_blocks: int,
        memory: Tensor | None = None,
        kernel: Callable[..., Any] | None = None,
    ) -> None:
        self._kernel = kernel or varlen_attn()
        self._shape, self._max_blocks = shape, max_blocks
        # Zeros, because the kernel may multiply values behind a sample's end by weights of zero.
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        free = None if memory is None else memory.zero_().view(shape.dtype)
        for number, layer in shape.cached():
            size = (shape.num_blocks + 1, shape.block_size, layer.kv_heads, layer.key_width)
            for caches in (self._keys, self._values):
                if free is None:
                    caches[number] = torch.zeros(size, dtype=shape.dtype, device=shape.device)
                    continue
                caches[number], free = free[: prod(size)].view(size), free[prod(size) :]
        self._indices: Sequence[Tensor] = ()
        self._max_query = 0
        self._sharing: Tensor | None = None
        # by number of decodes: first rows of each, which never change, and room for first keys
        self._starts: dict[int, tuple[Tensor, Tensor]] = {}
        self._decode = DecodeKernels()

    def indices(self, plan: StepPlan, *, pad_to: int = 0) -> list[Tensor]:
        """See `PagedAttention.indices`.

        Args:
            pad_to: pad to this many samples, with idle ones.
        """
        own = decode_indices(
            plan, self._shape.block_size, pad_to=pad_to, idle=self._shape.num_blocks
        )
        return [*own, *self.chunk_indices(plan)]

    def chunk_indices(self, plan: StepPlan) -> list[Tensor]:
        """See `PagedAttention.chunk_indices`: cells, blocks, numbers of keys, and the first rows
        among the step's; none without chunks.
        """
        if not plan.chunks:
            return []
        trash = self._shape.num_blocks
        held = [chunk.sample.blocks for chunk in plan.chunks]
        width = max(map(len, held))
        first = len(plan.decodes)
        starts = [
            *range(first),
            *accumulate((c.stop - c.start for c in plan.chunks), initial=first),
        ]
        return [
            chunk_cells(plan, self._shape.block_size),
            torch.tensor([blocks + [trash] * (width - len(blocks)) for blocks in held]).int(),
            torch.tensor([chunk.stop for chunk in plan.chunks], dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
        ]

    def prepare(self, plan: StepPlan, indices: Sequence[Tensor]) -> None:
        """See `PagedAttention.prepare`.

        Args:
            indices: with `DecodeRows.sharing` at the end, if a plan without chunks has it.
        """
        positions, cells, table, *others = indices
        chunked, self._sharing = (others, None) if plan.chunks else ((), next(iter(others), None))
        self._max_query = max((c.stop - c.start for c in plan.chunks), default=1)
        used = torch.add(positions, 1, out=positions.new_empty(len(positions), dtype=torch.int32))
        if chunked:
            own_cells, own_table, own_used, starts = chunked
            width = max(table.shape[1], own_table.shape[1])
            cells, used = torch.cat((cells, own_cells)), torch.cat((used, own_used))
            table = torch.cat([_widened(part, width) for part in (table, own_table)])
            key_starts = F.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
        else:
            starts, key_starts = self._starts_of(len(positions), used.device)
            torch.cumsum(used, 0, dtype=torch.int32, out=key_starts[1:])
        self._indices = cells, table, used, starts, key_starts

    def _starts_of(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if count not in self._starts:
            rows = torch.arange(count + 1, dtype=torch.int32, device=device)
            self._starts[count] = rows, torch.zeros_like(rows)
        return self._starts[count]

    def caches(self) -> Sequence[Tensor]:
        return [*self._keys.values(), *self._values.values()]

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [T, H, d]
        k: Tensor,  # [T, KVH, d]
        v: Tensor,  # [T, KVH, d]
        sinks: Tensor | None = None,  # [H]
    ) -> Tensor:
        found = self._shape.layers[layer]
        assert found is not None, f"layer {layer} has no cache"
        keys, values = self._keys[layer], self._values[layer]
        cells = self._indices[0]
        keys.flatten(0, 1).index_copy_(0, cells, k)
        values.flatten(0, 1).index_copy_(0, cells, v)
        return self._attend(layer, q, sinks)

    def attend_projected(
        self,
        layer: int,
        qkv: Tensor,  # [T, H + 2 KVH, d]
        turning: Turning,
        sinks: Tensor | None = None,  # [H]
    ) -> Tensor:
        """See `AttendProjected`."""
        found = self._shape.layers[layer]
        assert found is not None, f"layer {layer} has no cache"
        keys, values = self._keys[layer], self._values[layer]
        q = turn_and_store(qkv, self._indices[0], keys, values, turning)
        return self._attend(layer, q, sinks)

    def _attend(self, layer: int, q: Tensor, sinks: Tensor | None) -> Tensor:
        """Attend to what the cache holds."""
        found = self._shape.layers[layer]
        assert found is not None, f"layer {layer} has no cache"
        keys, values = self._keys[layer], self._values[layer]
        _, table, used, starts, key_starts = self._indices
        single = self._max_query == 1
        if single and self._decode.serves(q, self._shape.block_size):
            given = q, keys, values, table, used, found.options, sinks
            return self._decode(*given, sharing=self._sharing)
        # FlashAttention 2 requires lengths of keys although a block table makes them useless;
        # 3 and later refuse both together.
        old = current_flash_attention_impl() in (None, "FA2")
        out = self._kernel(
            q if single and old else q.contiguous(),
            keys,
            values,
            starts,
            key_starts if old else None,
            self._max_query,
            self._max_blocks * self._shape.block_size,
            scale=found.options.scale,
            window_size=_window_size(found.options.window, single),
            enable_gqa=True,
            seqused_k=used,
            block_table=table,
            # Split keys give wrong rows with block tables (issue 194167 of pytorch), and without
            # splits a row's result does not depend on the batch.
            num_splits=1,
            **({} if sinks is None else {"return_aux": _lse_too()}),
        )
        if sinks is None:
            assert isinstance(out, Tensor)
            return out
        return _without_sinks(out[0], out[1], sinks)


def _widened(table: Tensor, width: int) -> Tensor:
    return F.pad(table, (0, width - table.shape[1]))


def _lse_too() -> object:
    """Make the argument for `lse` in the result; imported late, as the kernel is."""
    from torch.nn.attention.varlen import AuxRequest

    return AuxRequest(lse=True)


def _window_size(window: int | None, single: bool) -> tuple[int, int]:
    """Return the numbers of keys before and after its own that a row sees; -1: all.

    A single query sees all keys. FlashAttention 2 reads them once for all heads of a group only if
    no window is given, not even a causal one.
    """
    if window is not None:
        return (window - 1, 0)
    return (-1, -1) if single else (-1, 0)


def _without_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Scale attention [T, H, d] by the keys' share of the softmax with sinks [H].

    Args:
        lse: [H, T], the logarithm of each row's sum of e^score.
    """
    assert lse.shape == (out.shape[1], out.shape[0]), (lse.shape, out.shape)
    share = torch.sigmoid(lse - sinks[:, None].float()).T
    return (out * share[..., None]).to(out.dtype)
