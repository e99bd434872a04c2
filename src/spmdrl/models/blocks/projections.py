"""Projections, norms and embeddings, of which a layer's blocks are made."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmdrl.distributed.parallel import Parallel, copy_to, reduce_from
from spmdrl.models.fused import Sum, rms_norm, sum_norm
from spmdrl.models.gradient_sums import GradientSum, summed_embedding
from spmdrl.models.linear import Blocked
from spmdrl.models.low_rank import Added, adapted_linear
from spmdrl.models.specs import NormSpec


@dataclass(frozen=True, kw_only=True)
class Build:
    """Making of a rank's modules: its place, and its tensors' dtype and device.

    Args:
        tp: this rank's place in the tensor-parallel group.
        ep: this rank's part of the experts, and the group with which tokens are exchanged for the
            other parts.
        blocks: number of blocks of fused projections, see `sharding.all_slices`.
        norm: the model's norms.
    """

    norm: NormSpec
    tp: Parallel = field(default_factory=Parallel)
    ep: Parallel = field(default_factory=Parallel)
    blocks: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "meta"

    def empty(self, *shape: int) -> nn.Parameter:
        """Make a parameter whose storage is not initialised: weights are filled later."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device))

    def buffer(self, *shape: int) -> nn.Parameter:
        """Make a parameter that does not train and stays float32, see `GlobalTensor.is_buffer`."""
        values = torch.empty(*shape, dtype=torch.float32, device=self.device)
        return nn.Parameter(values, requires_grad=False)

    def projection(self, rows: int, columns: int, *, bias: bool = False) -> Projection:
        return Projection(rows, columns, self, bias=bias)

    def rms_norm(self, size: int) -> Norm:
        return Norm(size, self)


class Projection(nn.Module):
    """Projection y = x W^T (+ b), whose storage is not initialised.

    `blocked` is the weight as laid out by `linear.in_blocks`; code that sets it keeps it current.
    `gradient_sum` takes the weight's gradient in place of autograd where a train backend sets it.
    """

    def __init__(self, rows: int, columns: int, build: Build, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = build.empty(rows, columns)
        self.bias = build.empty(rows) if bias else None
        self.blocked: Blocked | None = None
        self.gradient_sum: GradientSum | None = None

    def forward(self, x: Tensor, added: Added = ()) -> Tensor:
        return self._product(x, self.bias, added)

    def reduced(self, x: Tensor, tp: Parallel, added: Added = ()) -> Tensor:
        """Compute a row-parallel product: the sum over the ranks, and the bias added to it."""
        out = reduce_from(self._product(x, None, added), tp.group)
        return out if self.bias is None else out + self.bias

    def _product(self, x: Tensor, bias: Tensor | None, added: Added) -> Tensor:
        return adapted_linear(x, self.weight, bias, added, self.blocked, self.gradient_sum)


class Norm(nn.Module):
    """Root-mean-square norm over the last dim (Zhang & Sennrich 2019), float32 inside.

    With `tp` each rank applies the weight only to its own heads, and its gradients are summed.
    """

    def __init__(self, size: int, build: Build) -> None:
        super().__init__()
        self.spec = build.norm
        self.weight = build.empty(size)

    def forward(self, x: Tensor, tp: Parallel | None = None) -> Tensor:
        weight = self.weight if tp is None else copy_to(self.weight, tp.group)
        return rms_norm(x, weight, self.spec.eps, one_plus=self.spec.one_plus)

    def of_sum(self, given: Sum) -> tuple[Tensor, Tensor]:
        """Compute a residual sum and its norm."""
        return sum_norm(given, self.weight, self.spec.eps, one_plus=self.spec.one_plus)


class WideNorm(nn.Module):
    """Norm of all heads of a projection together, whose weight is cut as the projection's rows are.

    Args:
        size: elements on this rank.
        copies: number of ranks that hold each element.
    """

    def __init__(self, size: int, build: Build, copies: int = 1) -> None:
        super().__init__()
        self.spec, self.tp, self.copies = build.norm, build.tp, copies
        self.weight = build.empty(size)

    def forward(self, x: Tensor) -> Tensor:  # [T, heads, d]
        flat = x.flatten(1)
        if self.tp.group is None:
            return rms_norm(flat, self.weight, self.spec.eps).view(x.shape)
        wide = flat.to(torch.promote_types(x.dtype, torch.float32))
        squares = reduce_from(wide.square().sum(dim=1, keepdim=True), self.tp.group)
        count = flat.shape[1] * self.tp.size
        # the total enters every rank's result, so that its gradient is the sum of theirs
        mean = copy_to(squares, self.tp.group) / count
        scaled = (wide * (mean + self.spec.eps).rsqrt()).to(x.dtype)
        return (scaled * self.weight).view(x.shape)


class Embedding(nn.Module):
    """Vocabulary-parallel embedding: each rank looks up its own rows, and the results are summed.

    `blocked` serves a tied head, see `Projection`, and so does `gradient_sum`, which has the
    gradient of both uses then.
    """

    def __init__(self, rows: int, columns: int, build: Build) -> None:
        super().__init__()
        self.tp = build.tp
        self.weight = build.empty(rows, columns)
        self.blocked: Blocked | None = None
        self.gradient_sum: GradientSum | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.group is None:
            return self._rows(tokens)
        rows = self.weight.shape[0]
        local = tokens - self.tp.rank * rows
        absent = (local < 0) | (local >= rows)
        found = self._rows(local.masked_fill(absent, 0))
        return reduce_from(found.masked_fill(absent.unsqueeze(-1), 0), self.tp.group)

    def _rows(self, tokens: Tensor) -> Tensor:
        if self.gradient_sum is not None and torch.is_grad_enabled() and self.weight.requires_grad:
            return summed_embedding(tokens, self.weight, self.gradient_sum)
        return F.embedding(tokens, self.weight)
