"""Products of rows sorted by expert, with the additions of an adapter to experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from spmdrl.models.linear import Groups, grouped_linear, linear
from spmdrl.models.low_rank import Applied, added_to
from spmdrl.models.low_rank_products import Addition

RowsAdded = Sequence[tuple[Addition, Tensor | None]]
"""The additions to experts' matrices, with each row's factor [N, 1]; None: 1 for all rows."""


def added_to_experts(adapters: Sequence[Applied], local: str) -> RowsAdded:
    """Return the adapters' additions to the experts of a layer (`layers.0.mlp.experts.down`)."""
    found = added_to(adapters, local)
    return [(addition, None if how is None else how.rows) for addition, how in found]


def of_rows(added: RowsAdded, token: Tensor) -> RowsAdded:
    """Take the factors of each row's token, by its index [N]."""
    return [
        (addition, None if rows is None else rows.index_select(0, token))
        for addition, rows in added
    ]


def adapted_grouped(
    x: Tensor,  # [N, K], sorted by expert
    weight: Tensor,  # [E, M, K]
    added: RowsAdded,
    groups: Groups,
) -> Tensor:  # [N, M]
    """Compute `grouped_linear` with the additions to the rows' experts."""
    y = grouped_linear(x, weight, groups)
    for addition, rows in added:
        if addition.count == 1:
            _add_to_all(y, x, addition, rows)
            continue
        a = addition.lora_A.view(addition.count, -1, x.shape[1])
        u = grouped_linear(x, _aligned(a, 1), groups)
        if rows is not None:
            u = u * rows
        for span, b in zip(addition.spans, addition.b_weights(), strict=True):
            own = _aligned(u[:, span.ranks] * span.scale, 1)
            stacked = _aligned(b.view(addition.count, span.rows, span.rank), 2)
            y[:, span.first : span.first + span.rows] += grouped_linear(own, stacked, groups)
    return y


def _add_to_all(y: Tensor, x: Tensor, addition: Addition, rows: Tensor | None) -> None:
    """Add the products with one A and B to all rows, in place."""
    u = linear(x, addition.lora_A)
    if rows is not None:
        u = u * rows
    for span, b in zip(addition.spans, addition.b_weights(), strict=True):
        y[:, span.first : span.first + span.rows] += linear(u[:, span.ranks] * span.scale, b)


def _aligned(tensor: Tensor, dim: int) -> Tensor:
    """Pad a rank with zeros to the multiple of 8 that grouped products on GPUs take."""
    lacks = -tensor.shape[dim] % 8
    if not tensor.is_cuda or not lacks:
        return tensor
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, lacks))
