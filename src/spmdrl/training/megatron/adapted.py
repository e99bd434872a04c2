"""Low-rank additions to Megatron's column- and row-parallel linear layers.

The layers are a base model's and fixed; several roles can have additions to the same ones. A role
puts its own in place for the time in which its microbatches pass through the chunks, forward and
backward (a layer that is recomputed needs them again). A microbatch's dropout comes with its
`StreamParams`, each time that a layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    _gather_along_first_dim,
    _reduce_scatter_along_first_dim,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spmdrl.distributed.parallel import copy_to
from spmdrl.models.adapter_weights import AdapterWeights
from spmdrl.models.dropout import Dropout
from spmdrl.models.linear import linear, product
from spmdrl.models.low_rank import Applied, adapted_linear
from spmdrl.models.low_rank_products import (
    Addition,
    add_products,
    inner_gradients,
    inner_product,
    product_gradients,
)
from spmdrl.models.megatron_chunks import Parameter
from spmdrl.models.tensors import heads_per_rank
from spmdrl.training.megatron.modules import StreamParams


class _Adaptable(nn.Module):
    """A linear layer of Megatron with an addition, or none.

    Attributes:
        applied: the adapter and its addition to this layer, or nothing; a tuple, so that they do
            not become submodules.
        dropout: that of the addition's input in the current microbatch.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.applied: tuple[()] | tuple[AdapterWeights, Addition] = ()
        self.dropout: Dropout | None = None

    def _forward_impl(
        self,
        input: Tensor,  # [T, 1, K], with sequence parallelism this rank's part of T
        weight: Tensor,  # [N, K]
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **options: Any,
    ) -> Tensor:  # [T, 1, N]
        """Compute the product with this rank's part of the weight, as Megatron's method does."""
        if not self.applied:
            out: Tensor = super()._forward_impl(  # type: ignore[misc]
                input,
                weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **options,
            )
            return out
        weights, addition = self.applied
        x = input.flatten(0, 1)
        if sequence_parallel:
            y: Tensor = _SequenceAdapted.apply(  # type: ignore[no-untyped-call]
                *(x, weight, bias, addition, self.dropout, tp_group),
                *(addition.lora_A, *addition.b_weights()),
            )
        else:
            x = copy_to(x, tp_group if allreduce_dgrad else None)
            how = Applied(weights=weights, dropout=self.dropout)
            y = adapted_linear(x, weight, bias, [(addition, how)])
        return y.unsqueeze(1)


class AdaptableColumn(_Adaptable, ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's column-parallel linear layer, with an addition or none."""


class AdaptableRow(_Adaptable, RowParallelLinear):  # type: ignore[misc]
    """Megatron's row-parallel linear layer, with an addition or none."""


class _SequenceAdapted(torch.autograd.Function):
    """W x + b + scale B A x, where every tp rank has a part of the tokens of x, and gets its
    outputs of all tokens. Only its own part of x is kept for the backward pass, whose gradient of A
    is the share of these tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [T / tp, K]
        weight: Tensor,
        bias: Tensor | None,
        addition: Addition,
        dropout: Dropout | None,
        group: dist.ProcessGroup,
        a: Tensor,
        *b_weights: Tensor,
    ) -> Tensor:  # [T, N]
        whole = _gather_along_first_dim(x, group)
        y = linear(whole, weight, bias)
        u = inner_product(whole, a, addition, dropout)
        add_products(y, u, addition, b_weights)
        ctx.addition, ctx.group = addition, group
        # the gradients of A and x are of this rank's tokens
        ctx.dropout = None
        if dropout is not None:
            own = dropout.keys.chunk(group.size())[group.rank()]
            ctx.dropout = replace(dropout, keys=own)
        ctx.save_for_backward(x, weight, u, a, *b_weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, a, *b_weights = ctx.saved_tensors
        d_u, d_b = product_gradients(grad, u, ctx.addition, b_weights)
        d_u = _reduce_scatter_along_first_dim(d_u, ctx.group)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _reduce_scatter_along_first_dim(product(grad, weight.t()), ctx.group)
        d_a = inner_gradients(d_x, d_u, x, a, ctx.addition, ctx.dropout)
        return d_x, None, None, None, None, None, d_a, *d_b


class AdaptedChunk(nn.Module):
    """A chunk of a fixed model with one role's parameters there, which alone are this module's.

    Args:
        chunk: the fixed chunk, which other roles may use too.
        layers: the chunk's layers, in the whole model.
        weights: the role's additions to these layers, and its scalar head if the chunk is the last.
        rows: the parameters in order, see `adapter_chunks`.
    """

    def __init__(
        self,
        chunk: GPTModel,
        layers: range,
        weights: AdapterWeights,
        rows: Sequence[Parameter],
    ) -> None:
        super().__init__()
        self.weights: tuple[AdapterWeights] = (weights,)
        """A tuple, as `_chunk` is, so that it does not become a submodule with other names."""
        self._chunk = (chunk,)
        # Megatron's schedules and gradient buffers ask for these
        self.config, self.model_type = chunk.config, chunk.model_type
        held = dict(weights.named_parameters())
        assert held.keys() == {row.name for row in rows}, (held.keys(), rows)
        self.named = [(row, held[row.name]) for row in rows]
        for row, parameter in self.named:
            self.register_parameter(row.module_name, parameter)
        self._places: list[tuple[_Adaptable, Addition]] = []
        kv_heads = heads_per_rank(weights.model.attention.num_kv_heads, weights.tp.size)
        for number, layer in enumerate(layers):
            for local, module in _projections(chunk.decoder.layers[number]).items():
                addition = weights.addition(f"layers.{layer}.{local}")
                if addition is None:
                    continue
                if local == "attention.qkv":
                    # a key/value head's queries, key and value, as one of as many ranks has them
                    addition.blocks = kv_heads
                self._places.append((module, addition))

    def set_input_tensor(self, tensor: Any) -> None:
        """Give the chunk what the previous pipeline stage has sent."""
        self._chunk[0].set_input_tensor(tensor)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        out: Tensor = self._chunk[0](*arguments, **options)
        return out

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the role's additions in place inside the `with` block."""
        for module, addition in self._places:
            module.applied = (self.weights[0], addition)
        try:
            yield
        finally:
            for module, _ in self._places:
                module.applied = ()


def _projections(layer: Any) -> dict[str, _Adaptable]:
    """Local name within the layer -> the linear layer that can have an addition."""
    found = {
        "attention.qkv": layer.self_attention.linear_qkv,
        "attention.out": layer.self_attention.linear_proj,
    }
    if not isinstance(layer.mlp, MoELayer):
        found |= {"mlp.gate_up": layer.mlp.linear_fc1, "mlp.down": layer.mlp.linear_fc2}
    return found


def keep_differentiable(chunk: GPTModel) -> None:
    """Let gradients begin behind a fixed embedding where layers are recomputed.

    Megatron's recomputation gives a layer's parameters no gradient unless its input has one.
    """

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        wanted = module.training and torch.is_grad_enabled() and not output.requires_grad
        return output.requires_grad_() if wanted else output

    chunk.embedding.register_forward_hook(hook)


def pass_dropout(chunk: GPTModel) -> None:
    """Give a microbatch's dropout to the layers' projections whenever a layer computes."""

    def hook(layer: nn.Module, given: Any, options: dict[str, Any]) -> None:
        params: StreamParams = options["packed_seq_params"]
        for module in _projections(layer).values():
            module.dropout = params.dropout

    for layer in chunk.decoder.layers:
        layer.register_forward_pre_hook(hook, with_kwargs=True)
