"""Triton's kernels as the models call them: whether they serve, and their gradients.

Without `SWITCH`, without Triton, on other devices and for operands that no kernel takes, callers
compute by torch, which stays the reference.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SWITCH = "SPMDRL_GPU_KERNELS"
"""Environment variable that lets the kernels serve where it is 1: no card has run them yet."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that the kernels are compiled for in tests."""

MOST_WIDTH = 16384
"""Widest row of the norm's kernel, which holds it in a program's registers."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these operands: plain tensors in float32 or half precision on a GPU,
    where Triton is installed.
    """
    # Subclasses (fake tensors, which measure plans; DTensors) have no memory of their own.
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.dtype in _DTYPES and runs_on(t.device)
        for t in tensors
    )
    return plain and not torch.compiler.is_compiling()


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    return device.type == "cuda" and _runs_on(device.index)


@functools.cache
def _runs_on(index: int | None) -> bool:
    if os.environ.get(SWITCH) != "1" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(index) >= LEAST_CAPABILITY


def swiglu(gate_up: Tensor) -> Tensor:  # [T, 2 W] -> [T, W]
    """Compute `kernels.cuda.rows.swiglu`, with its gradient."""
    out: Tensor = _SwiGlu.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class _SwiGlu(torch.autograd.Function):
    """Keeps nothing but its operand."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        from spmdrl.models.kernels.cuda import rows

        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return rows.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from spmdrl.models.kernels.cuda import rows

        (gate_up,) = ctx.saved_tensors
        return rows.swiglu_backward(gate_up, grad.contiguous())


def rotate(
    x: Tensor,  # [T, H, d]
    cos: Tensor,  # [T, 1, r] float32
    sin: Tensor,  # [T, 1, r] float32
    interleaved: bool,
) -> Tensor:  # [T, H, d]
    """Compute `kernels.cuda.rows.rotate`, with its gradient by x."""
    out: Tensor = _Rotate.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Keeps the tables alone: the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        from spmdrl.models.kernels.cuda import rows

        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rows.rotate(side_by_side(x), cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        from spmdrl.models.kernels.cuda import rows

        cos, sin = ctx.saved_tensors
        back = rows.rotate_backward(side_by_side(grad), cos, sin, ctx.interleaved)
        return back, None, None, None


def reduce_logits(
    logits: Tensor,  # [N, K] float32
    places: Tensor,  # [N] int64
    scale: float,
    *,
    with_product: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `kernels.cuda.logprobs.reduce_logits`."""
    from spmdrl.models.kernels.cuda import logprobs

    return logprobs.reduce_logits(logits, places, scale, with_product=with_product)


def logit_factors(
    logits: Tensor,  # [N, K] float32
    normaliser: Tensor,  # [N]
    of_entropy: tuple[Tensor, Tensor, Tensor] | None,  # [N] each
    scale: float,
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """Compute `kernels.cuda.logprobs.logit_factors`.

    Args:
        of_entropy: the entropy, the gradients of log-probability and entropy; None: p alone.
    """
    from spmdrl.models.kernels.cuda import logprobs

    entropy, g, d_entropy = (None, None, None) if of_entropy is None else of_entropy
    return logprobs.logit_factors(logits, normaliser, entropy, g, d_entropy, scale, dtype)


def side_by_side(x: Tensor) -> Tensor:  # [T, heads, d]
    """Make the heads of a row contiguous; there may be gaps between rows."""
    dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()
