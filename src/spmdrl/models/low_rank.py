"""`AdapterWeights`: an adapter's matrices on this rank, and products with them.

The addition scale * B (A x) is computed with W x in one autograd function: W does not train, so
its product needs no stored input, and the backward pass keeps only x and A x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spmdrl.distributed.parallel import Parallel
from spmdrl.keyed_random import key64
from spmdrl.models.adapters import Adapter, adapter_tensors, lora_names, part_name
from spmdrl.models.config import ModelConfig
from spmdrl.models.dropout import Dropout
from spmdrl.models.linear import Blocked, linear, product, serves
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.low_rank_products import (
    Addition,
    Span,
    add_products,
    inner_gradients,
    inner_product,
    product_gradients,
)
from spmdrl.models.sharding import (
    SCORE,
    Slice,
    all_slices,
    fused_tensors,
    is_expert_parameter,
    local_parameters,
)

HEAD_WEIGHT = "head.weight"
"""Local name of a head's weight, in decoders and adapters alike."""


class AdapterWeights(nn.Module):
    """An adapter of a decoder on this rank, cut like the decoder; its storage is not initialised.

    Args:
        model: the global model.
        tp, ep, blocks: those of the decoder.
        head: whether it has a scalar head of its own, `head.weight`, in place of the decoder's.
    """

    def __init__(
        self,
        model: ModelConfig,
        adapter: Adapter,
        *,
        tp: Parallel | None = None,
        ep: Parallel | None = None,
        blocks: int = 1,
        head: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter
        self.tp = Parallel() if tp is None else tp
        self.ep = Parallel() if ep is None else ep
        self.head: nn.ParameterDict | None = None
        self._additions: dict[str, Addition] = {}
        tables = self.tables()
        shapes = local_parameters(
            model,
            self.tp.size,
            ep_size=self.ep.size,
            table=adapter_tensors(model, adapter),
        )
        for local, (spans, count) in _all_spans(model, adapter, self.tp, self.ep).items():
            name = f"{local}.lora_A"
            place = (shapes[name][1], tables[name][0].start[1])
            own_blocks = 1 if is_expert_parameter(local) else blocks
            addition = Addition(spans, *place, own_blocks, count, dtype=dtype, device=device)
            self._additions[local] = addition
            _add_module(self, local, addition)
        if head:
            row = torch.empty(1, model.hidden_size, dtype=dtype, device=device)
            self.head = nn.ParameterDict({"weight": nn.Parameter(row)})

    def addition(self, local: str) -> Addition | None:
        """Return the addition to a projection (`layers.0.attention.qkv`), if it has a target."""
        return self._additions.get(local)

    def head_weight(self) -> Tensor | None:
        """Return the weight [1, D] of its own scalar head, if it has one."""
        return None if self.head is None else self.head["weight"]

    def tables(self) -> dict[str, tuple[Slice, ...]]:
        """Return the slices of the global tensors that every parameter holds."""
        table = dict(adapter_tensors(self.model, self.adapter))
        if self.head is not None:
            table[HEAD_WEIGHT] = fused_tensors(self.model, "score")[HEAD_WEIGHT]
        return all_slices(
            self.model,
            self.tp.rank,
            self.tp.size,
            ep_rank=self.ep.rank,
            ep_size=self.ep.size,
            table=table,
        )


def _all_spans(
    model: ModelConfig, adapter: Adapter, tp: Parallel, ep: Parallel
) -> dict[str, tuple[list[Span], int]]:
    """Projection's local name -> the spans of its targets, and its number of experts, or 1."""
    found: dict[str, tuple[list[Span], int]] = {}
    slices_of = all_slices(model, tp.rank, tp.size, ep_rank=ep.rank, ep_size=ep.size)
    for local, slices in slices_of.items():
        count = 1
        if model.moe is not None and is_expert_parameter(local):
            count = model.moe.num_experts // ep.size
        spans: list[Span] = []
        for piece in slices[: len(slices) // count]:
            if (own := adapter.targets.get(piece.name)) is None:
                continue
            spans.append(
                Span(
                    part=part_name(piece.name),
                    key=key64(*piece.name.encode()),
                    first=piece.offset,
                    rows=piece.rows,
                    first_rank=sum(span.rank for span in spans),
                    rank=own.rank,
                    scale=own.scale,
                )
            )
        if spans:
            found[local.removesuffix(".weight")] = spans, count
    return found


def _add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *holders, last = path.split(".")
    for name in holders:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)


@dataclass(frozen=True, kw_only=True, eq=False)
class Applied:
    """An adapter as applied to a packed stream of tokens.

    Args:
        rows: factor of each token's addition, 0 or 1, [T, 1] in the dtype that is computed in;
            None: the adapter applies to all tokens.
        dropout: that of the adapter's inputs in a pass of an update; experts' have none.
        experts_only: whether it applies to experts only, because the other weights have it merged.
    """

    weights: AdapterWeights
    rows: Tensor | None = None
    dropout: Dropout | None = None
    experts_only: bool = False


Added = Sequence[tuple[Addition, Applied | None]]
"""The additions to one projection, and how each applies; None: to all tokens, without dropout."""


def added_to(adapters: Sequence[Applied], local: str) -> Added:
    """Return the adapters' additions to a projection."""
    applied = [each for each in adapters if not each.experts_only or is_expert_parameter(local)]
    found = ((each.weights.addition(local), each) for each in applied)
    return [(addition, each) for addition, each in found if addition is not None]


def adapted_linear(
    x: Tensor,  # [T, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    added: Added,
    blocked: Blocked | None = None,
) -> Tensor:  # [T, N]
    """Compute W x (+ b) with the additions; with gradients for one adapter, applied to all rows.

    Args:
        blocked: see `linear`.
    """
    if not added:
        return linear(x, weight, bias, blocked)
    if torch.is_grad_enabled() and (x.requires_grad or added[0][0].lora_A.requires_grad):
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


@torch.no_grad()
def merged(
    tensor: Tensor, slices: Sequence[Slice], adapter: Adapter, tensors: LocalTensors
) -> Tensor:
    """Return W + scale B A, rounded once from float32 to the dtype of W.

    Args:
        tensor, slices: a tensor of the base on this rank, whole or a shard.
        tensors: the adapter's tensors on this rank, which cover the boxes of `slices`.
    """
    out = tensor.to(torch.float32, copy=True)
    held = _boxes(tensors)
    for piece in slices:
        if (own := adapter.targets.get(piece.name)) is None:
            continue
        name_a, name_b = lora_names(piece.name)
        (a, of_a), (b, of_b) = held[name_a], held[name_b]
        rows = slice(piece.start[0] - of_b.start[0], piece.stop[0] - of_b.start[0])
        columns = slice(piece.start[1] - of_a.start[1], piece.stop[1] - of_a.start[1])
        box = out[piece.offset : piece.offset + piece.rows]
        box.addmm_(b[rows].float(), a[:, columns].float(), alpha=own.scale)
    return out.to(tensor.dtype)


def _boxes(tensors: LocalTensors) -> Mapping[str, tuple[Tensor, Slice]]:
    """Global name -> the box that is held here."""
    return {
        piece.name: (tensor[piece.offset : piece.offset + piece.rows], piece)
        for tensor, slices in tensors.values()
        for piece in slices
        if piece.name != SCORE
    }
