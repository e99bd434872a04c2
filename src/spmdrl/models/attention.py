"""Attention over a packed stream of tokens, described by spans.

A kernel turns a list of `spans.Span` into a function of q, k, v:

- `blocked`: explicit products of small tiles; fastest on CPUs; float32 and float64.
- `sdpa`: `scaled_dot_product_attention` per tile; any device and dtype.
- `varlen`: `torch.nn.attention.varlen`; CUDA, half precision.
- `flash`: the package flash-attn (2) or flash-attn-4; CUDA, half precision.
- `flex`: `flex_attention` with a block mask, compiled on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.parallel import gather_sum_grad
from spmdrl.models.attention_tiles import TiledKernel
from spmdrl.models.attention_varlen import (
    FlexKernel,
    flash_kernel,
    installed_flash,
    varlen_kernel,
)
from spmdrl.models.spans import AttentionFunction, Span, covers_rows

AttentionKind = Literal["blocked", "sdpa", "varlen", "flash", "flex"]
KINDS: tuple[AttentionKind, ...] = ("blocked", "sdpa", "varlen", "flash", "flex")


class AttentionKernel(Protocol):
    """Method to compute attention; made once by `make_kernel` and used for many lists of spans."""

    def prepare(
        self, spans: Sequence[Span], *, dtype: torch.dtype, device: torch.device
    ) -> AttentionFunction:
        """Make the differentiable function for spans whose rows cover all of q."""


class PackedAttention:
    """The decoder's `Attend` for one packed stream.

    Args:
        spans: spans in order, covering every row of q; with context parallelism rows of q are this
            rank's and key ranges are places in the gathered stream.
        kernel: a kernel of `make_kernel`.
        dtype, device: dtype and device of q, k and v.
        cp_group: ranks whose equal parts of keys and values are gathered (and gradients summed).
    """

    def __init__(
        self,
        spans: Sequence[Span],
        kernel: AttentionKernel,
        *,
        dtype: torch.dtype,
        device: torch.device,
        cp_group: dist.ProcessGroup | None = None,
    ) -> None:
        assert covers_rows(spans), spans
        self._function = kernel.prepare(spans, dtype=dtype, device=device)
        self._cp_group = cp_group

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [Tq, H_local, d]
        k: Tensor,  # [Tk, KVH_local, d]
        v: Tensor,  # [Tk, KVH_local, d]
    ) -> Tensor:  # [Tq, H_local, d]
        if self._cp_group is not None:
            # One collective for both: latency matters more than bytes here.
            both = gather_sum_grad(torch.cat((k, v), dim=1), self._cp_group)
            k, v = both.chunk(2, dim=1)
        return self._function(q, k, v)


def resolve_attention(name: str, device: torch.device, dtype: torch.dtype) -> AttentionKind:
    """Resolve `model.attention` to a kind for this device.

    Raises:
        ValueError: the name is unknown, or this device, dtype or installation cannot run the kind.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    on_cuda = device.type == "cuda"
    if name == "auto":
        if not on_cuda:
            return "sdpa" if half else "blocked"
        if not half:
            return "sdpa"
        # version 4 compiles a kernel when one is first needed, so it is taken only if asked for
        return "flash" if installed_flash() == 2 else "varlen"
    if name not in KINDS:
        raise ValueError(f"model.attention={name!r}: it must be auto or one of {', '.join(KINDS)}")
    if name in ("varlen", "flash") and not (on_cuda and half):
        raise ValueError(
            f"model.attention={name} needs CUDA and bfloat16 or float16, not {device.type} and "
            f"{dtype}: set it to auto"
        )
    if name == "flash" and installed_flash() is None:
        raise ValueError(
            "model.attention=flash needs the flash-attn package, which is not installed: "
            "install spmdrl[flash], or set it to auto"
        )
    if name == "blocked" and half:
        raise ValueError(f"model.attention=blocked computes in float32, not {dtype}: use sdpa")
    return name


def make_kernel(kind: AttentionKind) -> AttentionKernel:
    """Make the kernel of a resolved kind."""
    if kind in ("blocked", "sdpa"):
        return TiledKernel(explicit=kind == "blocked")
    if kind == "flex":
        return FlexKernel()
    return flash_kernel() if kind == "flash" else varlen_kernel()
