"""Triton's kernels as the models call them: whether they serve, and their gradients.

Without `SWITCH`, without Triton, on other devices and for operands that no kernel takes, callers
compute by torch, which stays the reference.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SWITCH = "SPMDRL_GPU_KERNELS"
"""Environment variable that lets the kernels serve where it is 1: no card has run them yet."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that the kernels are compiled for in tests."""

MOST_WIDTH, MOST_BACKWARD_WIDTH = 16384, 8192
"""Widest rows of the norm's kernels, which hold them in a program's registers."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these operands: plain tensors in float32 or half precision on a GPU,
    where Triton is installed.
    """
    if torch.compiler.is_compiling():
        return False
    # Subclasses (fake tensors, which measure plans; DTensors) have no memory of their own.
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype in _DTYPES and runs_on(t.device)
        for t in tensors
    )


def is_switched_on() -> bool:
    """Whether a run asks for the kernels; a GPU and Triton may still be missing."""
    return os.environ.get(SWITCH) == "1"


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    return device.type == "cuda" and _runs_on(device.index)


@functools.cache
def _runs_on(index: int | None) -> bool:
    if not is_switched_on() or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(index) >= LEAST_CAPABILITY


def norms(x: Tensor, *others: Tensor) -> bool:
    """Whether the norm's kernels take rows [T, D], what is added to them, and a weight."""
    if torch.compiler.is_compiling() or not runs_on(x.device) or x.ndim != 2:
        return False
    most = MOST_BACKWARD_WIDTH if torch.is_grad_enabled() else MOST_WIDTH
    alike = all(t.is_contiguous() and t.dtype == x.dtype for t in (x, *others))
    return alike and x.shape[1] <= most and serves(x, *others)


def add_rms_norm(
    x: Tensor,  # [T, D]
    out: Tensor,  # [T, D]
    weight: Tensor,  # [D]
    eps: float,
    *,
    scale: float,
    one_plus: bool,
) -> tuple[Tensor, Tensor]:  # [T, D] each
    """Compute `kernels.cuda.rows.add_rms_norm`, with its gradients."""
    total, normed = _AddNorm.apply(  # type: ignore[no-untyped-call]
        x, out, weight, eps, scale, one_plus
    )
    return total, normed


def rms_norm(
    x: Tensor,  # [T, D]
    weight: Tensor,  # [D]
    eps: float,
    *,
    one_plus: bool,
) -> Tensor:  # [T, D]
    """Compute the norm of `kernels.cuda.rows.add_rms_norm` alone, with its gradients."""
    found: Tensor = _AddNorm.apply(  # type: ignore[no-untyped-call]
        x, None, weight, eps, 1.0, one_plus
    )
    return found


class _AddNorm(torch.autograd.Function):
    """Keeps the sum alone, from which the backward computes each row's factor again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        out: Tensor | None,
        weight: Tensor,
        eps: float,
        scale: float,
        one_plus: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from spmdrl.models.kernels.cuda import rows

        total, normed = rows.add_rms_norm(x, out, weight, eps, scale=scale, one_plus=one_plus)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.scale, ctx.one_plus = eps, scale, one_plus
        ctx.set_materialize_grads(False)
        return normed if out is None else (total, normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from spmdrl.models.kernels.cuda import rows

        total, weight = ctx.saved_tensors
        *of_total, d_normed = grads
        d_total = of_total[0] if of_total else None
        if d_normed is None:  # nothing has used the norm
            d, d_weight = d_total, None
        else:
            given = None if d_total is None else d_total.contiguous()
            d, wide = rows.add_rms_norm_backward(
                *(total, weight, d_normed.contiguous(), given, ctx.eps), one_plus=ctx.one_plus
            )
            d_weight = wide.to(weight.dtype)
        d_out = d if d is None or ctx.scale == 1.0 else d * ctx.scale
        return d, d_out if of_total else None, d_weight, None, None, None


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


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyPlaces:
    """Places at which keys and values are laid out, more than one for some tokens.

    Args:
        rows: the token of each place, int64 [M].
        order: the places of token 0, of token 1, and so on, int64 [M].
        starts: the first of each token's places in `order`, with M at the end, int32 [T + 1].
    """

    rows: Tensor
    order: Tensor
    starts: Tensor


def lay_out(
    qkv: Tensor,  # [T, H + 2 KVH, d]
    kv_heads: int,
    cos: Tensor,  # [T, 1, r] float32
    sin: Tensor,  # [T, 1, r] float32
    interleaved: bool,
    places: KeyPlaces | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [T, H, d], [M, KVH, d] twice
    """Compute `kernels.cuda.laid_out.lay_out`, with its gradient.

    Args:
        places: None: one place for each token, in order.
    """
    q, k, v = _LayOut.apply(  # type: ignore[no-untyped-call]
        side_by_side(qkv), kv_heads, cos, sin, interleaved, places
    )
    return q, k, v


class _LayOut(torch.autograd.Function):
    """Keeps the tables and places alone."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        kv_heads: int,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        places: KeyPlaces | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from spmdrl.models.kernels.cuda import laid_out

        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.places = interleaved, places
        rows = None if places is None else places.rows
        return laid_out.lay_out(qkv, kv_heads, cos, sin, interleaved, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        from spmdrl.models.kernels.cuda import laid_out

        cos, sin = ctx.saved_tensors
        places = None if ctx.places is None else (ctx.places.order, ctx.places.starts)
        grads = side_by_side(d_q), d_k.contiguous(), d_v.contiguous()
        d_qkv = laid_out.lay_out_backward(grads, cos, sin, ctx.interleaved, places)
        return d_qkv, None, None, None, None, None


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
    places: Tensor,  # [N] int64
    normaliser: Tensor,  # [N]
    g: Tensor,  # [N]
    of_entropy: tuple[Tensor, Tensor] | None,  # [N] each
    scale: float,
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """Compute `kernels.cuda.logprobs.logit_factors`."""
    from spmdrl.models.kernels.cuda import logprobs

    return logprobs.logit_factors(logits, places, normaliser, g, of_entropy, scale, dtype)


def side_by_side(x: Tensor) -> Tensor:  # [T, heads, d]
    """Make the heads of a row contiguous; there may be gaps between rows."""
    dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()
