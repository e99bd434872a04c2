"""`Addition`: the matrices of one projection's targets on this rank, and products with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spmdrl.models.dropout import Dropout
from spmdrl.models.linear import product, serves


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One target's place in a fused projection of this rank, or of a part of it: queries, keys and
    values that files hold in one matrix share A, and their B are below one another.

    Args:
        part: its name there (`q_proj`).
        first, rows: its outputs.
        first_b: the first of its rows of B.
        first_rank, rank: its rows of the stacked A.
        scale: factor of B A.
        key: number of the matrix among all of the model, for random numbers.
    """

    part: str
    key: int
    first: int
    rows: int
    first_rank: int
    rank: int
    scale: float
    first_b: int = 0

    @property
    def ranks(self) -> slice:
        """The target's rows of the stacked A."""
        return slice(self.first_rank, self.first_rank + self.rank)


class Addition(nn.Module):
    """A and B of the targets in one fused projection of this rank; not initialised.

    Args:
        spans: the targets, in the projection's order; those of one expert if it has experts.
        columns: width of the projection's input on this rank.
        first_column: the input's first column among those of the whole matrix.
        blocks: see `sharding.all_slices`; a target's outputs are then in as many pieces.
        count: number of experts whose A and B are stacked; 1 if one A and B serves all rows.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        columns: int,
        first_column: int,
        blocks: int,
        count: int = 1,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.spans, self.first_column, self.blocks = tuple(spans), first_column, blocks
        self.count = count

        def empty(rows: int, width: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count * rows, width, dtype=dtype, device=device))

        self.inner = tuple({span.first_rank: span for span in reversed(self.spans)}.values())[::-1]
        """One span for each target."""
        self._parts = dict(Counter(span.part for span in self.spans))
        rows = {span.part: span.first_b + span.rows for span in self.spans}
        self.lora_A = empty(sum(span.rank for span in self.inner), columns)
        self.lora_B = nn.ParameterDict({s.part: empty(rows[s.part], s.rank) for s in self.inner})

    def b_weights(self) -> list[Tensor]:
        """Return B of every span, in order."""
        return [self._b_weight(span) for span in self.spans]

    def _b_weight(self, span: Span) -> Tensor:
        whole: Tensor = self.lora_B[span.part]
        if self._parts[span.part] == 1:
            return whole
        return whole[span.first_b : span.first_b + span.rows]


def add_products(y: Tensor, u: Tensor, addition: Addition, b_weights: Sequence[Tensor]) -> None:
    """Add scale * B u to y, in place, target by target."""
    for span, b in zip(addition.spans, b_weights, strict=True):
        own = u[:, span.ranks]
        if addition.blocks == 1:
            y[:, span.first : span.first + span.rows].addmm_(own, b.t(), alpha=span.scale)
        else:
            delta = product(own, b)
            view = _pieces(y, addition, span)
            view.add_(delta.view(view.shape), alpha=span.scale)


def _pieces(y: Tensor, addition: Addition, span: Span) -> Tensor:  # [T, blocks, rows / blocks]
    """Return a target's outputs, which lie in as many pieces as there are blocks."""
    first, rows = span.first // addition.blocks, span.rows // addition.blocks
    return y.view(len(y), addition.blocks, -1)[:, :, first : first + rows]


def _outputs(y: Tensor, addition: Addition, span: Span) -> Tensor:  # [T, rows]
    if addition.blocks == 1:
        return y[:, span.first : span.first + span.rows]
    return _pieces(y, addition, span).reshape(len(y), span.rows)


def product_gradients(
    grad: Tensor,  # [T, N]
    u: Tensor,  # [T, ranks]
    addition: Addition,
    b_weights: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Compute the gradients of u and of every target's B in scale * B u, given the outputs'."""
    d_u = torch.empty_like(u)
    d_b = []
    for span, b in zip(addition.spans, b_weights, strict=True):
        own = _outputs(grad, addition, span)
        # another part of the same target may have come before
        put_product(d_u[:, span.ranks], own, b.t(), span.scale, adds=bool(span.first_b))
        d_b.append(torch.empty_like(b))
        put_product(d_b[-1], own.t(), u[:, span.ranks].t(), span.scale)
    return d_u, d_b


def put_product(
    out: Tensor,  # [M, N]
    a: Tensor,  # [M, K], any strides
    b: Tensor,  # [N, K], any strides
    scale: float,
    *,
    adds: bool = False,
) -> None:
    """Put scale a b^T into `out`, without gradient; on GPUs in one launch, rounded once.

    Args:
        adds: add it to what is there; without, that may be anything.
    """
    if not serves(a, b):
        out.addmm_(a, b.t(), beta=int(adds), alpha=scale)
    elif adds:
        out.add_(product(a, b), alpha=scale)
    else:
        torch.mul(product(a, b), scale, out=out)


def inner_product(
    x: Tensor,  # [T, K]
    a: Tensor,  # [ranks, K]
    addition: Addition,
    dropout: Dropout | None,
) -> Tensor:  # [T, ranks]
    """Compute A x, where each target may zero other elements of x."""
    if dropout is None:
        return product(x, a)
    u = x.new_empty(len(x), len(a))
    for span in addition.inner:
        own = dropout.apply(x, span.key, addition.first_column)
        u[:, span.ranks] = product(own, a[span.ranks])
    return u


def inner_gradients(
    d_x: Tensor | None,  # [T, K], added to
    d_u: Tensor,  # [T, ranks]
    x: Tensor,
    a: Tensor,
    addition: Addition,
    dropout: Dropout | None,
) -> Tensor:
    """Compute the gradients of `inner_product`; returns that of A."""
    if dropout is None:
        if d_x is not None:
            d_x.addmm_(d_u, a)
        return product(d_u.t(), x.t())
    d_a = torch.empty_like(a)
    for span in addition.inner:
        own, place = d_u[:, span.ranks], (span.key, addition.first_column)
        d_a[span.ranks] = product(own.t(), dropout.apply(x, *place).t())
        if d_x is not None:
            d_x.add_(dropout.apply(product(own, a[span.ranks].t()), *place))
    return d_a
