"""SwiGLU and root-mean-square norm, on CPUs in blocks that stay in the cache, on GPUs by Triton.

Autograd's chains of elementwise operations read and write each [T, width] tensor in memory several
times, and keep the intermediate results. Here rows are processed block by block, and the backward
recomputes cheap values. (SmolLM2-135M: 15 % less time and 0.6 GB less memory in an update.)

Without gradient, in float32, `rows` computes each in one pass. On GPUs a residual sum is computed
together with the norm that follows it, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.models.kernels import gpu
from spmdrl.models.kernels.cpu import rows_for

BLOCK_BYTES = 1 << 19
"""Bytes of one operand's block; a handful of blocks fit into a core's cache."""


def swiglu(gate_up: Tensor) -> Tensor:  # [T, 2 W], gate and up side by side -> [T, W]
    """Compute silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    if rows := rows_for(gate_up):
        return rows.swiglu(gate_up)
    if gpu.serves(gate_up):
        return gpu.swiglu(gate_up)
    if not _pays(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    out: Tensor = _SwiGlu.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    eps: float,
    *,
    one_plus: bool = False,
) -> Tensor:  # [..., D]
    """Compute x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        one_plus: multiply by 1 + weight.
    """
    if gpu.norms(x, weight):
        return gpu.rms_norm(x, weight, eps, one_plus=one_plus)
    if one_plus:
        # 1 + w may need more bits than bfloat16 has
        wide = torch.promote_types(x.dtype, torch.float32)
        return rms_norm(x.to(wide), 1 + weight.to(wide), eps).to(x.dtype)
    if rows := rows_for(x, weight):
        return rows.rms_norm(x, weight, eps)
    if not _pays(x):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class Sum(NamedTuple):
    """A residual sum x + scale * out that is computed with the norm of it.

    A tuple, in which hooks of FSDP2 and DeepSpeed find the tensors that modules pass on.

    Args:
        x, out: [T, D], side by side.
    """

    x: Tensor
    out: Tensor
    scale: float = 1.0

    def total(self) -> Tensor:
        """Compute the sum alone."""
        return add(self.x, self.out, self.scale)


def later_sum(x: Tensor, out: Tensor, scale: float) -> Tensor | Sum:  # [T, D] each
    """Add to the residual stream: at once, or on a GPU, later."""
    return Sum(x=x, out=out, scale=scale) if gpu.norms(x, out) else add(x, out, scale)


def add(x: Tensor, out: Tensor, scale: float) -> Tensor:
    """Compute x + scale * out."""
    return x + out if scale == 1.0 else torch.add(x, out, alpha=scale)


def sum_norm(
    given: Sum, weight: Tensor, eps: float, *, one_plus: bool
) -> tuple[Tensor, Tensor]:  # [T, D] each
    """Compute a sum and its norm in one pass."""
    if not gpu.norms(given.x, given.out):
        total = given.total()
        return total, rms_norm(total, weight, eps, one_plus=one_plus)
    return gpu.add_rms_norm(given.x, given.out, weight, eps, scale=given.scale, one_plus=one_plus)


def _pays(x: Tensor) -> bool:
    """Whether blocks pay: on a CPU, before a backward (CUDA fuses; a forward takes few passes)."""
    if torch.compiler.is_compiling():
        return False
    wide = x.dtype in (torch.float32, torch.float64)
    return wide and x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad


def _blocks(x: Tensor) -> Iterator[slice]:
    """Return row ranges of a 2-d tensor, block by block."""
    size = max(1, BLOCK_BYTES // max(1, x.shape[1] * x.element_size()))
    return (slice(start, start + size) for start in range(0, x.shape[0], size))


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[1] // 2
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(gate_up.shape[0], width)
        for rows in _blocks(out):
            gate, up = gate_up[rows].chunk(2, dim=1)
            part = out[rows]
            torch.sigmoid(gate, out=part)
            part.mul_(gate).mul_(up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        for rows in _blocks(grad):
            gate, up = gate_up[rows].chunk(2, dim=1)
            d_gate, d_up = d_gate_up[rows].chunk(2, dim=1)
            s, d = torch.sigmoid(gate), grad[rows]
            silu = gate * s
            torch.mul(d, silu, out=d_up)
            # silu' = s + silu (1 - s)
            torch.addcmul(s, silu, s, value=-1, out=d_gate)
            d_gate.add_(silu).mul_(up).mul_(d)
        return d_gate_up


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.empty(x.shape, dtype=x.dtype)
        scales = torch.empty(flat.shape[0], 1, dtype=x.dtype)
        for rows, part in zip(_blocks(flat), _parts(out, flat), strict=True):
            block = flat[rows]
            square = torch.linalg.vecdot(block, block)[:, None]
            scale = square.div_(flat.shape[1]).add_(eps).rsqrt_()
            scales[rows] = scale
            torch.mul(block, scale, out=part)
            part.mul_(weight)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scales = ctx.saved_tensors
        flat, d = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        d_x = torch.empty(x.shape, dtype=x.dtype)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows, part in zip(_blocks(flat), _parts(d_x, flat), strict=True):
            block, scale = flat[rows], scales[rows]
            product = d[rows] * block
            if d_weight is not None:
                d_weight.addmv_(product.t(), scale[:, 0])
            # dx = r (w dy) - x r^3 mean(w dy x), r = the row's scale
            mean = torch.mv(product, weight)[:, None].div_(flat.shape[1])
            torch.mul(d[rows], weight, out=part)
            part.addcmul_(block, mean.mul_(scale).mul_(scale), value=-1).mul_(scale)
        return d_x, d_weight, None


def _parts(out: Tensor, flat: Tensor) -> Iterator[Tensor]:
    rows = out.view(-1, out.shape[-1])
    return (rows[block] for block in _blocks(flat))
