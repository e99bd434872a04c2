"""Products y = x W_e^T of rows sorted by expert e: one grouped GEMM on GPUs, else a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.models.linear import product


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Numbers of the sorted rows per expert.

    Args:
        counts: int64 [E], on the rows' device; rows after the last group belong to none.
        sizes: the same numbers on the host, if they are known there.
    """

    counts: Tensor
    sizes: Sequence[int] | None = None


def grouped_gemm_is_usable(dtype: torch.dtype, device: torch.device, *widths: int) -> bool:
    """Whether torch has one kernel for all experts, which needs no sizes on the host.

    `torch.nn.functional.grouped_mm` takes bfloat16 on GPUs from compute capability 8.0; the bytes
    of a row must be a multiple of 16.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or not torch.cuda.is_available():
        return False
    aligned = all(width % 8 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(device) >= (8, 0)


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
        ctx.save_for_backward(x, weight)
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
        d_x = torch.empty_like(x) if for_x else None
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
