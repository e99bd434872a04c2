"""Differentiable collectives of tensor, context and expert parallelism.

Each function takes a process group, or None if the degree is 1 (then it is the identity). The
pairs are those of Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053, section 3):
`copy_to` before a column-parallel product and `reduce_from` after a row-parallel one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank's place along one axis, such as a layer's tensor parallelism."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Concatenation along dim 0 of equal parts; `reduce` selects the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, reduce: bool) -> Tensor:
        ctx.group, ctx.reduce = group, reduce
        x = x.contiguous()
        parts = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        # the list forms: torch 2.13 deprecates the names of the tensor forms that 2.11 has
        dist.all_gather(list(parts.chunk(dist.get_world_size(group))), x, group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        if not ctx.reduce:
            return grad.chunk(size)[rank].contiguous(), None, None
        out = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
        dist.reduce_scatter(out, list(grad.contiguous().chunk(size)), group=ctx.group)
        return out, None, None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, got), group
        return _exchange_rows(x, sent, got, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, got = ctx.sizes
        return _exchange_rows(grad, got, sent, ctx.group), None, None, None


def _exchange_rows(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), got, sent, group=group)
    return out


def copy_to(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Identity forward, all-reduce (sum) backward."""
    return x if group is None else _apply(_CopyTo, x, group)


def reduce_from(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce (sum) forward, identity backward."""
    return x if group is None else _apply(_ReduceFrom, x, group)


def gather_sum_grad(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather along dim 0 (equal parts); the backward sums the ranks' gradients.

    Use it for a gathered tensor that each rank uses differently (context-parallel keys).
    """
    return x if group is None else _apply(_Gather, x, group, True)


def gather_own_grad(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-gather along dim 0 (equal parts); the backward takes this rank's part.

    Use it for a gathered tensor from which every rank computes the same loss (log-probabilities).
    """
    return x if group is None else _apply(_Gather, x, group, False)


def all_to_all_rows(
    x: Tensor, sent: Sequence[int], got: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[i]` rows (in order) to rank i of the group; returns the rows received from all
    ranks, in rank order, `got[i]` of them from rank i. The backward sends the gradients back.
    """
    return _apply(_AllToAllRows, x, list(sent), list(got), group)


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send row i of `counts` [ranks, ...] to rank i; returns the rows received, in rank order."""
    got = torch.empty_like(counts)
    dist.all_to_all_single(got, counts.contiguous(), group=group)
    return got


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result
