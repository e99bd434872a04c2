"""Leaves of weights that DeepSpeed has moved, and the module that its engine wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.sharding import Head
from spmdrl.models.zero_layout import ZeroParameter, partition_range, zero_parameters
from spmdrl.training.body import RoleWeights
from spmdrl.training.deepspeed.parts import cut, zero_parameter
from spmdrl.training.weights import Leaf


class Trained(nn.Module):
    """The module that an engine of ZeRO 1 and 2 wraps: trained parameters, a call of the decoder.

    The decoder is no submodule: the engine would broadcast and cast all of its parameters, also
    those that are fixed and shared by other roles, or float32 in every layout.
    """

    def __init__(self, decoder: nn.Module, leaves: Sequence[Leaf]) -> None:
        super().__init__()
        self._decoder = (decoder,)
        self.trained = nn.ParameterList([leaf.parameter for leaf in leaves])

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self._decoder[0](*arguments, **named)


class Whole(nn.Module):
    """The module that an engine of ZeRO 3 wraps: a decoder, and the adapter that it is called with.

    The hooks that gather weights are those of its submodules; an adapter's weights are gathered
    with the projections that ask for them. Columns come as one tensor: each output has a hook, and
    ranks whose losses read other columns (one with an empty microbatch, say) would call unlike
    hooks, which DeepSpeed takes for unlike models.
    """

    def __init__(self, weights: RoleWeights) -> None:
        super().__init__()
        self.decoder, self.added = weights.body.decoder, weights.added

    def forward(self, *arguments: Any, **named: Any) -> Tensor:  # [C, N]
        return torch.stack(self.decoder(*arguments, **named))


def unstacked(call: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a call of `Whole` that gives the columns one by one, as the decoder does."""

    def columns(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        return call(*arguments, **named).unbind(0)

    return columns


def trained_leaves(weights: RoleWeights, order: Mapping[str, int]) -> list[Leaf]:
    """Return the leaves that train, in the order in which layouts lay them into flat buffers: that
    of the table of tensors, which modules and an adapter's names do not always have.

    Args:
        order: place of every local name, see `layout_order`.
    """
    return sorted((leaf for leaf in weights.leaves if leaf.trained), key=lambda x: order[x.name])


def layout_order(model: ModelConfig, head: Head, adapter: Adapter | None) -> dict[str, int]:
    """Return the place of every local name in `models.zero_layout`."""
    names = (p.name for p in zero_parameters(model, head=head, adapter=adapter, frozen=()))
    return {name: place for place, name in enumerate(names)}


def whole_parameters(weights: RoleWeights) -> dict[str, ZeroParameter]:
    """Return what layouts say of each leaf, by name, before ZeRO 3 divides the weights."""
    return {leaf.name: zero_parameter(leaf) for leaf in weights.leaves}


def found_again(weights: RoleWeights, *, sharded: bool) -> RoleWeights:
    """Return the same weights after their parameters were given other storage.

    Args:
        sharded: whether ZeRO 3 has divided the decoder's parameters: a leaf's weight is then this
            rank's flat part, with padding.
    """
    decoder: Mapping[str, nn.Parameter] = dict(weights.body.decoder.named_parameters())
    added: Mapping[str, nn.Parameter] = {}
    if weights.added is not None:
        added = dict(weights.added.named_parameters())

    def found(leaves: Iterable[Leaf], now: Mapping[str, nn.Parameter]) -> tuple[Leaf, ...]:
        made = []
        for leaf in leaves:
            parameter = now.get(leaf.name, leaf.parameter)
            own: Tensor = vars(parameter)["ds_tensor"] if sharded else parameter
            own = own.detach()
            made.append(replace(leaf, parameter=parameter, weight=own, master=own))
        return tuple(made)

    body = replace(weights.body, leaves=found(weights.body.leaves, decoder))
    return replace(weights, body=body, own=found(weights.own, added))


def local_boxes(leaf: Leaf, parameter: ZeroParameter, mesh: Mesh, *, sharded: bool) -> LocalTensors:
    """Return a leaf's weight on this rank as boxes of the name space, by their local names."""
    count = mesh.size("reduce") if sharded else 1
    if count == 1:
        return {leaf.name: (leaf.weight.view(parameter.shape), leaf.slices)}
    start, stop = partition_range(parameter.numel, mesh.coordinate("reduce"), count)
    return cut(parameter, leaf.weight[: stop - start], start)


@torch.no_grad()
def clear_padding(leaves: Iterable[Leaf]) -> None:
    """Set all values to 0, of which those at the end of a rank's part are no parameter's."""
    for leaf in leaves:
        leaf.weight.zero_()
