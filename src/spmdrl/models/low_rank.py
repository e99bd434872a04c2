"""Products with low-rank additions.

The addition scale * B (A x) is computed with W x in one autograd function: W does not train, so
its product needs no stored input, and the backward pass keeps only x and A x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spmdrl.models.dropout import Dropout
from spmdrl.models.gradient_sums import GradientSum, summed_linear
from spmdrl.models.linear import Blocked, linear, product, serves
from spmdrl.models.low_rank_products import (
    Addition,
    add_products,
    inner_gradients,
    inner_product,
    product_gradients,
)
from spmdrl.models.tensors import is_expert_parameter


class Additions(Protocol):
    """An adapter's matrices on this rank (`adapter_weights.AdapterWeights`)."""

    def addition(self, local: str) -> Addition | None:
        """Return the addition to a projection (`layers.0.attention.qkv`), if it has a target."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Applied:
    """An adapter as applied to a packed stream of tokens.

    Args:
        rows: factor of each token's addition, 0 or 1, [T, 1] in the dtype that is computed in;
            None: the adapter applies to all tokens.
        dropout: that of the adapter's inputs in a pass of an update; experts' have none.
        experts_only: whether it applies only to experts and other weights without a copy in blocks,
            because the copies have it merged.
    """

    weights: Additions
    rows: Tensor | None = None
    dropout: Dropout | None = None
    experts_only: bool = False


Added = Sequence[tuple[Addition, Applied | None]]
"""The additions to one projection, and how each applies; None: to all tokens, without dropout."""


def added_to(adapters: Sequence[Applied], local: str, *, merges: bool = True) -> Added:
    """Return the adapters' additions to a projection.

    Args:
        merges: whether a copy of its weight exists where `Applied.experts_only` says so.
    """
    merges = merges and not is_expert_parameter(local)
    applied = [each for each in adapters if not (each.experts_only and merges)]
    found = ((each.weights.addition(local), each) for each in applied)
    return [(addition, each) for addition, each in found if addition is not None]


def adapted_linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    added: Added,
    blocked: Blocked | None = None,
    gradient_sum: GradientSum | None = None,
) -> Tensor:  # [T, N]
    """Compute W x (+ b) with the additions; with gradients for one adapter, applied to all rows.

    Args:
        blocked: see `linear`.
        gradient_sum: takes the gradient of a weight that trains.
    """
    if not added:
        if gradient_sum is not None and torch.is_grad_enabled() and weight.requires_grad:
            return summed_linear(x, weight, bias, gradient_sum)
        return linear(x, weight, bias, blocked)
    trains = torch.is_grad_enabled() and (x.requires_grad or added[0][0].lora_A.requires_grad)
    if trains and not torch.compiler.is_compiling():  # whose graph keeps no more
        [(addition, how)] = added
        assert not weight.requires_grad, "an adapter trains over a fixed matrix"
        assert how is None or how.rows is None, "an adapter trains on all rows"
        out: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            *(x, weight, bias, addition, None if how is None else how.dropout),
            *(addition.lora_A, *addition.b_weights()),
        )
        return out
    y = linear(x, weight, bias, blocked)
    for addition, how in added:
        rows, dropout = (None, None) if how is None else (how.rows, how.dropout)
        # with one where a pass is recomputed later, which begins without gradients
        u = inner_product(x, addition.lora_A, addition, dropout)
        add_products(y, u if rows is None else u * rows, addition, addition.b_weights())
    return y


class _Adapted(torch.autograd.Function):
    """W x + b + scale B A x; gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        addition: Addition,
        dropout: Dropout | None,
        a: Tensor,
        *b_weights: Tensor,
    ) -> Tensor:
        y = linear(x, weight, bias) if serves(x, weight) else F.linear(x, weight, bias)
        u = inner_product(x, a, addition, dropout)
        add_products(y, u, addition, b_weights)
        ctx.addition, ctx.dropout = addition, dropout
        ctx.save_for_backward(x, weight, u, a, *b_weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, a, *b_weights = ctx.saved_tensors
        d_u, d_b = product_gradients(grad, u, ctx.addition, b_weights)
        d_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        d_a = inner_gradients(d_x, d_u, x, a, ctx.addition, ctx.dropout)
        return d_x, None, None, None, None, d_a, *d_b
