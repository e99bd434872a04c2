"""Products y = x W^T (+ b); on the CPU, in float32, by oneDNN's kernels instead of MKL's.

torch gives float32 products to MKL, which leaves half of an AMD processor unused, and most of any
processor if rows are few (a decode step). oneDNN generates kernels for the processor that it finds.
On two cores of an EPYC with AVX-512, products of SmolLM2-135M's shapes, in GFLOP/s:

    rows                          8    32    1024
    MKL                          37    88     202
    oneDNN                       78   213     450
    oneDNN, weight in blocks    137   284     472

If a compiler exists, a laid-out weight is in the panels of the project's own kernel. On another
EPYC with AVX-512 (two cores of some 105), and on one with AVX2 only (Zen 3, two of 94):

    rows                          1     8    16    32   128  1024
    AVX-512, oneDNN in blocks    20   113   153   161   205   194
    AVX-512, panels              27   153   180   171   210   190
    AVX2, oneDNN                                   71         137
    AVX2, panels                                  110         150

With AVX2 only, MKL still computes the products of gradients, whose second operand is transposed. In
GFLOP/s over the model's shapes:

    rows                        128   512  2048
    forward, MKL                 87   102   134
    forward, oneDNN             123   124   137
    inputs' gradient, MKL       123   158   143
    inputs' gradient, oneDNN    112   140   118
    weights' gradient, MKL       82   123   152
    weights' gradient, oneDNN    71    87   101

The two round differently. On seven texts, logits of SmolLM2-135M, which reach 28, differ from those
of transformers in float64 by 0.6e-4 to 1.1e-4 (transformers in float32), 0.6e-4 to 1.1e-4 (here, by
MKL) and 0.7e-4 to 1.9e-4 (by oneDNN); from transformers in float32 by 0.7e-4 to 1.0e-4 (by MKL) and
0.9e-4 to 1.5e-4 (by oneDNN). Another order of summation in only one kind of layer, such as the
output projections, changes them by 0.6e-4 to 1.0e-4: that is float32's resolution there.

Products y = x W_e^T of rows sorted by expert e: one grouped GEMM on GPUs, else a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.models.kernels.cpu import Panels, lay_out

Blocked = Tensor | Panels
"""A weight as laid out by `in_blocks`."""

ROWS_HINT = 32
"""Number of rows that a weight is laid out for; blocks for 32 suit 1 to 2048 about as well."""

_IS_NARROW = torch.backends.cpu.get_cpu_capability() == "AVX2"
_HAS_PANELS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether to use panels: only on processors of the kinds that were measured."""


def linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    blocked: Blocked | None = None,
) -> Tensor:  # [T, N]
    """Compute `F.linear`, with its gradients.

    Args:
        blocked: `weight` as laid out by `in_blocks`, used if no gradient is needed.
    """
    if not serves(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    if isinstance(blocked, Panels):
        return blocked.product(x, bias)
    return _product(x, weight if blocked is None else blocked, bias)


def wide_linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    blocked: Blocked | None = None,
) -> Tensor:  # [T, N]
    """Compute `linear` in float32 or wider, without gradient: logits.

    On GPUs the sums of half-precision products are not rounded to half precision, whose step at a
    logit of 20 is 0.125.
    """
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return linear(x, weight, blocked=blocked).to(torch.promote_types(x.dtype, torch.float32))


def product(
    a: Tensor,  # [M, K], any strides
    b: Tensor,  # [N, K], any strides
) -> Tensor:  # [M, N]
    """Compute a b^T, without gradient."""
    by_onednn = serves(a, b) and not (_IS_NARROW and b.stride(1) != 1)
    return _product(a, b, None) if by_onednn else a @ b.t()


def add_product(
    total: Tensor,  # [M, N] float32 (or as the factors), added to
    a: Tensor,  # [M, K], any strides
    b: Tensor,  # [N, K], any strides
) -> None:
    """Add a b^T, without gradient; on GPUs the sums of half-precision products are not rounded."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b.t(), out_dtype=torch.float32, out=total)
    else:
        total.add_(product(a, b))


def wide_product(
    a: Tensor,  # [M, K], any strides
    b: Tensor,  # [N, K], any strides
) -> Tensor:  # [M, N]
    """Compute a b^T in float32 (or wider), as `add_product` does."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return product(a, b).to(torch.promote_types(a.dtype, torch.float32))


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes it; `torch.backends.mkldnn.flags(enabled=False)` disables it."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[0] > 0
        and torch._C._has_mkldnn
        and torch._C._get_mkldnn_enabled()
    )


def in_blocks(weight: Tensor) -> Blocked:  # [N, K] -> of about the same size
    """Copy a float32 CPU weight into the layout that this machine's fastest kernel reads best."""
    if _HAS_PANELS and (panels := lay_out(weight)) is not None:
        return panels
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return blocked


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # The operation that torch's compiler emits for linear layers (torch 2.0 to 2.15).
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # x only serves the gradient of a weight that trains
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if for_x else None,
            product(grad.t(), x.t()) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Numbers of the sorted rows per expert.

    Args:
        counts: int64 [E], on the rows' device; rows after the last group belong to none.
        sizes: the same numbers on the host, if they are known there.
    """

    counts: Tensor
    sizes: Sequence[int] | None = None


LEAST_CAPABILITY = (8, 0)
"""Compute capability from which GPUs have the kernels for grouped rows and paged attention."""


def grouped_gemm_is_usable(
    dtype: torch.dtype,
    device: torch.device,
    *widths: int,
    capability: tuple[int, int] | None = None,
) -> bool:
    """Whether torch has one kernel for all experts, which needs no sizes on the host.

    `torch.nn.functional.grouped_mm` takes bfloat16 on GPUs from compute capability 8.0; the bytes
    of a row must be a multiple of 16.

    Args:
        capability: the GPU's compute capability; by default the device is asked.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    if capability is None:
        if not torch.cuda.is_available():
            return False
        capability = torch.cuda.get_device_capability(device)
    return all(width % 8 == 0 for width in widths) and capability >= LEAST_CAPABILITY


def grouped_linear(
    x: Tensor,  # [N, K], sorted by expert
    weight: Tensor,  # [E, M, K]
    groups: Groups,
) -> Tensor:  # [N, M]; rows that belong to no group are not defined
    """Multiply each row by the weight of its expert."""
    if grouped_gemm_is_usable(x.dtype, x.device, *weight.shape[1:]):
        return grouped_gemm(x, weight, groups.counts)
    sizes = groups.counts.tolist() if groups.sizes is None else groups.sizes
    out: Tensor = _Loop.apply(x, weight, tuple(sizes))  # type: ignore[no-untyped-call]
    return out


def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Compute `grouped_linear` by torch's kernel (on CPUs by torch's reference of it)."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


class _Loop(torch.autograd.Function):
    """Products, one per expert that has rows; gradients are written in place, expert by expert
    (autograd's gradient of one slice of the weight would be as large as the weight).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        assert sum(sizes) == x.shape[0], (sum(sizes), x.shape)
        # x only serves the gradient of weights that train
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for expert, size in enumerate(sizes):
            if size:
                rows = slice(start, start + size)
                out[rows] = product(x[rows], weight[expert])
            start += size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        d_x = grad.new_empty(len(grad), weight.shape[2]) if for_x else None
        d_weight = torch.empty_like(weight) if for_weight else None
        start = 0
        for expert, size in enumerate(ctx.sizes):
            rows = slice(start, start + size)
            if size and d_x is not None:
                d_x[rows] = product(grad[rows], weight[expert].t())
            if d_weight is not None and size:
                d_weight[expert] = product(grad[rows].t(), x[rows].t())
            elif d_weight is not None:
                d_weight[expert].zero_()
            start += size
        return d_x, d_weight, None
