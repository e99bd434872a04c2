"""`TrainMemory`: bytes that a training system adds to a rank's weights and activations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalShard, Table, counted
from spmdrl.models.sharding import Head, fused_tensors, local_parameters
from spmdrl.role_spec import RoleSpec


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes of one rank of a role, in addition to weights and activations.

    Args:
        optimizer: masters and moments; 0 for a role that is frozen.
        gradients: sums of gradients, as an optimizer step has them from its passes.
        reads: gathered weights in a pass without gradients.
        passes: gathered weights and buffers of messages in a forward and a backward pass.
        offloads: parts (`weights`, `base`, `optimizer`) that the system keeps on the host itself.
        can_stream: whether the optimizer can stay on the host and step in windows, see
            `TrainOptions.host_state`.
        host: further bytes of the host.
    """

    optimizer: int
    gradients: int
    reads: int = 0
    passes: int = 0
    offloads: frozenset[str] = frozenset()
    can_stream: bool = False
    host: int = 0


def plain_memory(spec: RoleSpec, weights: Table, states: Table) -> TrainMemory:
    """Return the memory of a system that holds masters, two moments and float32 gradients.

    Args:
        weights, states: the rank's tables of `TrainSystem.layout` and `state_layout`.
    """
    if not spec.trained:
        return TrainMemory(optimizer=0, gradients=0)
    return TrainMemory(
        optimizer=optimizer_bytes(weights, states), gradients=gradient_bytes(weights)
    )


def optimizer_bytes(weights: Table, states: Table) -> int:
    """Bytes of AdamW's two moments in float32, and of the masters if the weights are narrower."""
    held = counted(weights)
    narrow = [(shard, count) for shard, count in held if shard.dtype != torch.float32]
    # FSDP's shards that train are float32, tensors that it does not cut and those that do not train
    # may be narrower; else all have one dtype
    masters = narrow if len(narrow) < len(held) else counted(states)
    return 2 * trained_bytes(states) + _trained_bytes(masters)


def gradient_bytes(table: Table) -> int:
    """Bytes of float32 gradients, without the short-lived ones in the dtype of narrower weights."""
    return trained_bytes(table)


def trained_bytes(table: Table) -> int:
    """Bytes of the values that train, each in float32."""
    return _trained_bytes(counted(table))


def _trained_bytes(held: Iterable[tuple[LocalShard, int]]) -> int:
    return sum(4 * math.prod(shard.shape) * count for shard, count in held if not shard.frozen)


@dataclass(frozen=True, kw_only=True)
class UnitSizes:
    """Values of a tensor-parallel rank's parameters, by the units that are gathered.

    Args:
        layer: those of the largest layer.
        rest: those outside layers.
        largest: those of the largest parameter.
    """

    layer: int
    rest: int
    largest: int


@lru_cache(maxsize=64)  # every rank asks for those of its role
def unit_sizes(model: ModelConfig, head: Head, tp: int, ep: int) -> UnitSizes:
    """Count the values of a rank's layers; layers that are alike count once."""
    one_of_each = {layer: number for number, layer in enumerate(model.layers)}
    kinds = tuple(f"layers.{number}." for number in one_of_each.values())
    table = {
        name: tensors
        for name, tensors in fused_tensors(model, head).items()
        if name.startswith(kinds) or not name.startswith("layers.")
    }
    local = local_parameters(model, tp, ep_size=ep, table=table)
    sizes = {name: math.prod(shape) for name, shape in local.items()}
    layers = (
        sum(values for name, values in sizes.items() if name.startswith(kind)) for kind in kinds
    )
    return UnitSizes(
        layer=max(layers),
        rest=sum(values for name, values in sizes.items() if not name.startswith("layers.")),
        largest=max(sizes.values()),
    )


def with_fsdp(spec: RoleSpec, held: TrainMemory) -> TrainMemory:
    """Add what FSDP2 gathers with `dp_shard`: the parameters outside layers, and two layers; in a
    backward pass also their gradients, and the float32 buffer that is reduced.
    """
    degrees, size = spec.placement.degrees, spec.dtype.itemsize
    if degrees["dp_shard"] == 1:
        return held
    units = unit_sizes(spec.model, spec.head, degrees["tp"], degrees.get("ep", 1))
    gathered = (units.rest + 2 * units.layer) * size
    reduced = 0 if spec.has_fixed_base else max(units.rest, units.layer) * (size + 4)
    return replace(held, reads=gathered, passes=gathered + reduced)
