"""Gradients of parameters, summed over microbatches in a wider dtype than the parameters have.

A product that is a weight's gradient adds to the sum as it is computed. So it is not rounded to the
weight's dtype before, and no pass casts and adds it (Megatron-LM's fused gradient accumulation does
the same, https://github.com/NVIDIA/Megatron-LM, `gradient_accumulation_fusion`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.models.linear import add_product, product, wide_product


class GradientSum:
    """The gradient of one parameter in float32, or wider if the parameter is.

    Modules hold it, and a train backend that takes it from them before each optimizer step.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add a gradient that autograd has made."""
        if self.total is None:
            self.total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        else:
            self.total.add_(gradient)

    def add_product(
        self,
        a: Tensor,  # [M, K], any strides
        b: Tensor,  # [N, K], any strides
    ) -> None:
        """Add a b^T [M, N] to a matrix's gradient."""
        if self.total is None:
            self.total = wide_product(a, b)
        else:
            add_product(self.total, a, b)

    def start(self, like: Tensor) -> Tensor:
        """Return the sum to add to; zeros of this shape, if there is none yet."""
        if self.total is None:
            wide = torch.promote_types(like.dtype, torch.float32)
            self.total = torch.zeros(like.shape, dtype=wide, device=like.device)
        return self.total

    def take(self) -> Tensor | None:
        """Return the sum, None if nothing was added, and begin anew."""
        total, self.total = self.total, None
        return total


def summed_linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    total: GradientSum,
) -> Tensor:  # [T, N]
    """Compute `F.linear`; the weight's gradient is added to `total`, and autograd gets none.

    In a compiled graph `total` must have been started.
    """
    if torch.compiler.is_compiling():
        assert total.total is not None, "the graph adds to what it is given"
        compiled: Tensor = _compiled_linear(x, weight, bias, total.total)
        return compiled
    out: Tensor = _Linear.apply(x, weight, bias, total)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: GradientSum
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ctx.total.add_product(grad.t(), x.t())
        d_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return d_x, None, grad.sum(0) if ctx.needs_input_grad[2] else None, None


@torch.library.custom_op("spmdrl::add_product", mutates_args=("total",))
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute `add_product`; torch's compiler sees an operation that writes to `total`."""
    add_product(total, a, b)


@torch.library.custom_op("spmdrl::summed_linear", mutates_args=())
def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
    """Compute `_Linear`, as torch's compiler takes it."""
    return F.linear(x, weight, bias)


@_compiled_linear.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x, weight, _, total = inputs
    ctx.save_for_backward(x, weight, total)


def _add_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    x, weight, total = ctx.saved_tensors
    _add_product(total, grad.t(), x.t())
    d_x = grad @ weight if ctx.needs_input_grad[0] else None
    return d_x, None, grad.sum(0) if ctx.needs_input_grad[2] else None, None


_compiled_linear.register_autograd(_add_gradient, setup_context=_keep)


def summed_embedding(
    tokens: Tensor,  # [T] int64
    weight: Tensor,  # [V, D]
    total: GradientSum,
) -> Tensor:  # [T, D]
    """Compute `F.embedding`; the gradient is added to `total`, whose other rows are not touched."""
    out: Tensor = _Embedding.apply(tokens, weight, total)  # type: ignore[no-untyped-call]
    return out


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, total: GradientSum) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.total = total
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        tokens, weight = ctx.saved_tensors
        total = ctx.total.start(weight)
        # on CUDA this sorts, so that the sums have one order; `index_add_` has none there
        total.index_put_((tokens,), grad.to(total.dtype), accumulate=True)
        return None, None, None
