"""Facts about the roles, from configuration and shapes: kinds, devices, layouts, memory."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from spmdrl.config.data_sets import held_out_sets
from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.call_memory import Turns
from spmdrl.models.config import ModelConfig
from spmdrl.models.degrees import check_tp
from spmdrl.models.fsdp_cuts import fitting_blocks
from spmdrl.models.sharding import Head, fused_tensors
from spmdrl.placement import Placement, role_device_type
from spmdrl.planning.engines import check_engine, shares_tensors, vocab_multiple
from spmdrl.planning.memory import RankMemory, Shape, plan_memory
from spmdrl.roles.custom import Custom, UserRole, check_scores, declared_bytes, make_user_role
from spmdrl.roles.handles import Policy, Reference, Reward, Value
from spmdrl.roles.model_calls import ModelRole
from spmdrl.training.megatron.checks import (
    MegatronOptions,
    check_installed,
    check_megatron,
    model_cut,
)
from spmdrl.training.protocol import TrainBackend
from spmdrl.weights.layout import WeightLayout, model_layout
from spmdrl.weights.megatron import megatron_layout, megatron_state_layout
from spmdrl.weights.plan import SyncPlan, plan_sync


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of role with a model on a train backend: its handle, and its head."""

    make: Callable[[str, Mesh, ModelConfig, TrainBackend | None, Turns | None], ModelRole]
    head: Head


KINDS: Mapping[str, Kind] = {
    "policy": Kind(make=Policy, head="lm"),
    "reference": Kind(make=Reference, head="lm"),
    "teacher": Kind(make=partial(Reference, prefix="teacher"), head="lm"),
    "reward": Kind(make=Reward, head="score"),
    "value": Kind(make=Value, head="score"),
}


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """Facts about the roles that are known before any of them exists.

    Args:
        devices: device of each role, without an index.
        blocks: blocks of each role with a model, see `shard_blocks`.
        layouts: every rank's tensors of each role's model.
        state_layouts: every rank's masters and moments of the optimizer.
        syncs: weight sync by rollout.
        memory: memory plan by rank.
        users: the objects behind users' own roles.
    """

    devices: Mapping[str, torch.device]
    blocks: Mapping[str, int]
    layouts: Mapping[str, WeightLayout]
    state_layouts: Mapping[str, WeightLayout]
    syncs: Mapping[str, SyncPlan]
    memory: Mapping[int, RankMemory]
    users: Mapping[str, UserRole]


def training_dtype(config: Config, device: torch.device) -> torch.dtype:
    """`model.dtype`; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    if config.model.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def role_head(config: Config, name: str) -> Head:
    """The head of a role's model."""
    kind = config.role_kind(name)
    return KINDS[kind].head if kind in KINDS else "lm"


def check_model(config: Config, name: str, placement: Placement, shape: ModelConfig) -> None:
    """Refuse degrees that do not divide the role's model, and settings that need experts.

    Raises:
        ValueError: the model does not suit them (role and numbers are named), or megatron-core is
            missing where it is needed.
    """
    _check_experts(config, name, shape)
    if uses_megatron(config, name):
        check_installed(name)
        check_megatron(name, shape, placement.degrees, megatron_options(config, name))
        return
    tp, ep = placement.degrees["tp"], placement.degrees["ep"]
    try:
        check_tp(shape, tp, ep=ep)
    except ValueError as error:
        raise ValueError(f"roles.{name}: {error}") from None
    if config.role_kind(name) == "rollout" and tp % ep:
        raise ValueError(
            f"roles.{name}.ep={ep} with roles.{name}.tp={tp}: the replicas of a rollout generate "
            "each at its own pace and exchange no tokens, so its ep must divide its tp"
        )


def _check_experts(config: Config, name: str, shape: ModelConfig) -> None:
    """Refuse routing replay and a balance loss for a model without experts."""
    if shape.moe is not None:
        return
    lacks = f"the model of roles.{name} ({shape.architecture}) has no experts"
    if config.algorithm.routing_replay and config.role_kind(name) in ("policy", "rollout"):
        raise ValueError(f"algorithm.routing_replay=true, but {lacks}: set it to false")
    coefficient = config.train_section(name).balance_coef
    if coefficient > 0 and config.is_trained(name):
        raise ValueError(
            f"train.balance_coef={coefficient}, but {lacks}: set it, or "
            f"roles.{name}.train.balance_coef, to 0"
        )


def frozen_names(config: Config, name: str, shape: ModelConfig) -> frozenset[str]:
    """The Hugging Face names of the parameters that `roles.NAME.freeze` keeps unchanged.

    Raises:
        ValueError: no name fits a pattern; all parameters are frozen; or only some of those in one
            tensor (the projections of an attention, say).
    """
    patterns = config.roles[name].freeze
    tensors = fused_tensors(shape, role_head(config, name))
    known = [part.name for parts in tensors.values() for part in parts]
    key = f"roles.{name}.freeze={list(patterns)}"
    frozen: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(known, pattern)
        if not fitting:
            raise ValueError(f"{key}: no parameter fits {pattern!r}; there are {known[:4]} ...")
        frozen.update(fitting)
    for parts in tensors.values():
        inside = [part.name for part in parts if part.name in frozen]
        if 0 < len(inside) < len(parts):
            lacking = next(part.name for part in parts if part.name not in frozen)
            raise ValueError(
                f"{key}: {inside[0]} and {lacking} lie in one tensor, so freeze both or neither"
            )
    if len(frozen) == len(known):
        raise ValueError(f"{key}: that is every parameter; set roles.{name}.trained: false")
    return frozenset(frozen)


def plan_roles(
    config: Config,
    placements: Mapping[str, Placement],
    shapes: Mapping[str, ModelConfig],
    device_types: Sequence[str],
    node_size: int = 1,
    gpu_bytes: int | None = None,
) -> RolePlan:
    """Layouts, weight syncs and memory of the roles, from configuration and the models' shapes.

    Args:
        device_types: device type of every rank of the world.
        node_size: ranks of a node.
        gpu_bytes: the memory of the world's smallest GPU, by default of this host's.

    Raises:
        ValueError: roles do not fit on the device together (sizes are given), a role is on ranks
            with and without a GPU, or an engine cannot be placed so.
    """
    check_engine(config, placements, shapes, len(device_types))
    devices = {
        name: torch.device(
            role_device_type(name, config.roles[name].device, placement.ranks, device_types)
        )
        for name, placement in placements.items()
    }
    blocks = {name: shard_blocks(config, placements, shape, name) for name, shape in shapes.items()}
    layouts = {
        name: role_layout(config, placements[name], shape, name, devices[name], blocks[name])
        for name, shape in shapes.items()
    }
    syncs = _plan_syncs(config, layouts, devices, node_size)
    states = {
        name: state_layout(config, placements[name], shape, name, devices[name], layouts[name])
        for name, shape in shapes.items()
    }
    known = _described(config, shapes, layouts, states, devices)
    users = {
        name: make_user_role(name, config.role_kind(name), role.options)
        for name, role in config.roles.items()
        if ":" in config.role_kind(name)
    }
    for name in _scoring_roles(config) & users.keys():
        check_scores(name, users[name])
    customs = {
        name: Custom(num_bytes=declared_bytes(user), device=devices[name])
        for name, user in users.items()
    }
    memory = plan_memory(config, placements, known, syncs, device_types, customs, gpu_bytes)
    return RolePlan(
        devices=devices,
        blocks=blocks,
        layouts=layouts,
        state_layouts=states,
        syncs=syncs,
        memory=memory,
        users=users,
    )


def _scoring_roles(config: Config) -> set[str]:
    """The roles that rewards name, including those of held-out sets."""
    lists = (config.rewards, *(described.rewards for described in held_out_sets(config).values()))
    return {reward.role for rewards in lists for reward in rewards if reward.role is not None}


def _described(
    config: Config,
    shapes: Mapping[str, ModelConfig],
    layouts: Mapping[str, WeightLayout],
    states: Mapping[str, WeightLayout],
    devices: Mapping[str, torch.device],
) -> dict[str, Shape]:
    """The memory plan's input about roles with a model."""
    return {
        name: Shape(
            kind=config.role_kind(name),
            config=shape,
            head=role_head(config, name),
            layout=layouts[name],
            state_layout=states[name],
            device=devices[name],
            dtype=training_dtype(config, devices[name]),
        )
        for name, shape in shapes.items()
    }


def _plan_syncs(
    config: Config,
    layouts: Mapping[str, WeightLayout],
    devices: Mapping[str, torch.device],
    node_size: int,
) -> dict[str, SyncPlan]:
    """The sync from the policy to each rollout; none if there is no policy."""
    kinds = {name: config.role_kind(name) for name in layouts}
    policy = next((name for name, kind in kinds.items() if kind == "policy"), None)
    if policy is None:
        return {}
    return {
        name: plan_sync(
            layouts[policy],
            layouts[name],
            node_size=node_size,
            bucket_bytes=config.rollout.sync_bucket_mb * 10**6,
            share=shares_tensors(config, name, devices[name]),
        )
        for name, kind in kinds.items()
        if kind == "rollout"
    }


def uses_megatron(config: Config, name: str) -> bool:
    """Whether the role has a model that Megatron computes."""
    return config.role_kind(name) in KINDS and config.train_section(name).backend == "megatron"


def megatron_options(config: Config, name: str) -> MegatronOptions:
    given = config.roles[name].megatron
    # the two layers of a tiny model cannot be interleaved
    vpp = 1 if config.model.tiny else given.get("vpp", 1)
    return MegatronOptions(vpp=vpp, sp=given.get("sp", False))


def role_layout(
    config: Config,
    placement: Placement,
    shape: ModelConfig,
    name: str,
    device: torch.device,
    blocks: int = 1,
) -> WeightLayout:
    """Every rank's tensors of a role's model (a rollout's weights are never sharded).

    Args:
        blocks: see `shard_blocks`.
    """
    degrees = dict(placement.degrees)
    if config.role_kind(name) == "rollout":
        degrees["dp_replicate"] *= degrees["dp_shard"]
        degrees["dp_shard"] = 1
    dtype, head = training_dtype(config, device), role_head(config, name)
    if uses_megatron(config, name):
        cut = model_cut(degrees, megatron_options(config, name), device)
        return megatron_layout(shape, placement.ranks, degrees, cut, dtype, head)
    return model_layout(
        shape,
        placement.ranks,
        degrees,
        dtype,
        head=head,
        frozen=frozen_names(config, name, shape),
        vocab_multiple=vocab_multiple(config, name),
        blocks=blocks,
        shard_dtype=torch.float32,  # FSDP2 keeps the masters, and casts while it gathers
    )


def shard_blocks(
    config: Config, placements: Mapping[str, Placement], shape: ModelConfig, name: str
) -> int:
    """The number of blocks that align a policy's shards with a rollout on the same ranks, so that a
    rank trains what it generates with and a sync sends nothing; 1 if there is none.
    """
    if config.role_kind(name) != "policy" or uses_megatron(config, name):
        return 1
    own = placements[name]
    fitting = [
        fitting_blocks(shape, own.degrees, placement.degrees["tp"])
        for other, placement in placements.items()
        if config.role_kind(other) == "rollout" and placement.ranks == own.ranks
    ]
    return max(fitting, default=1)


def state_layout(
    config: Config,
    placement: Placement,
    shape: ModelConfig,
    name: str,
    device: torch.device,
    layout: WeightLayout,
) -> WeightLayout:
    """Every rank's masters and moments: cut like the weights, or by Megatron's optimizer."""
    if not uses_megatron(config, name):
        return layout
    cut = model_cut(placement.degrees, megatron_options(config, name), device)
    head = role_head(config, name)
    return megatron_state_layout(shape, placement.ranks, placement.degrees, cut, head)
