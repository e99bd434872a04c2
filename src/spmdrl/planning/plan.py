"""The plan of all roles before any of them exists: layouts, weight syncs, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from spmdrl.config.data_sets import held_out_sets
from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import WeightLayout
from spmdrl.placement import DeviceType, Placement
from spmdrl.planning.adapter_choice import AdapterUse, adapter_use
from spmdrl.planning.engines import check_engine, shares_tensors
from spmdrl.planning.judge_bases import check_bases
from spmdrl.planning.layouts import check_model, shard_blocks
from spmdrl.planning.margins import Margin, margin_of
from spmdrl.planning.memory import RankMemory, plan_memory
from spmdrl.planning.parts import held_models
from spmdrl.planning.sketch import HeldWeights, KeptLayouts, sketch_sync
from spmdrl.role_spec import RoleSpec, device_types, make_specs
from spmdrl.roles.custom import Custom, UserRole, check_scores, declared_bytes, make_user_role
from spmdrl.weights.plan import SyncPlan, plan_sync


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """Facts about the roles that are known before any of them exists.

    Args:
        specs: the roles with a model.
        devices: device type of each role.
        blocks: blocks of each role with a model, see `shard_blocks`.
        layouts: every rank's tensors of each role's model.
        state_layouts: every rank's masters and moments of the optimizer.
        syncs: weight sync by rollout.
        adapters: use of the policy's adapter by rollout, if it has one.
        memory: memory plan by rank.
        margin: the memory of a GPU that the plans leave free.
        users: the objects behind users' own roles.
    """

    specs: Mapping[str, RoleSpec]
    devices: Mapping[str, DeviceType]
    blocks: Mapping[str, int]
    layouts: Mapping[str, WeightLayout]
    state_layouts: Mapping[str, WeightLayout]
    syncs: Mapping[str, SyncPlan]
    adapters: Mapping[str, AdapterUse]
    memory: Mapping[int, RankMemory]
    margin: Margin
    users: Mapping[str, UserRole]


def plan_roles(
    config: Config,
    placements: Mapping[str, Placement],
    models: Mapping[str, ModelConfig],
    ranks: Sequence[str],
    node_size: int = 1,
    gpu_bytes: int | None = None,
    *,
    refuses: bool = True,
    kept: KeptLayouts | None = None,
) -> RolePlan:
    """Specs, layouts, weight syncs and memory of the roles, from configuration and their models.

    Args:
        models: configuration of each role's model.
        ranks: device type of every rank of the world.
        node_size: ranks of a node.
        gpu_bytes: the free memory of the world's fullest GPU, by default of this host's.
        refuses: False: also plan roles that do not fit on the device together.
        kept: layouts and syncs that plans of these models share; see `KeptLayouts`.

    Raises:
        ValueError: degrees do not divide a model, roles do not fit on the device together (sizes
            are given), a role is on ranks with and without a GPU, or an engine cannot be placed so.
    """
    devices = device_types(config, placements, ranks)
    specs = make_specs(config, placements, models, devices)
    _check_specs(config, specs, len(ranks))
    blocks = {name: shard_blocks(spec, specs) for name, spec in specs.items()}
    kept = KeptLayouts() if kept is None else kept
    layout, state = kept.maker(specs.values()), kept.states
    layouts = {name: layout(spec, blocks[name]) for name, spec in specs.items()}
    check_bases(specs, layouts)
    states = {name: state(spec, layouts[name]) for name, spec in specs.items()}
    bucket_bytes = config.rollout.sync_bucket_mb * 10**6
    plan = sketch_sync if kept.sketches else _plan_sync
    plans = partial(kept.sync, partial(plan, node_size, bucket_bytes))
    syncs = _plan_syncs(specs, layouts, plans)
    adapters = _adapter_uses(config, specs, syncs)
    if changed := [n for n, use in adapters.items() if use.merged and specs[n].adapter is not None]:
        specs |= {name: replace(specs[name], adapter=None) for name in changed}
        layouts |= {name: layout(specs[name], 1) for name in changed}
        states |= {name: layouts[name] for name in changed}
        syncs = _plan_syncs(specs, layouts, plans)
    users = user_roles(config)
    customs = _customs(users, placements, devices)
    held = held_models(specs, layouts, states)
    margin = margin_of(specs, _on_gpus(placements, devices), syncs, node_size, len(ranks))
    return RolePlan(
        specs=specs,
        devices=devices,
        blocks=blocks,
        layouts=layouts,
        state_layouts=states,
        syncs=syncs,
        adapters=adapters,
        memory=plan_memory(config, held, customs, syncs, ranks, gpu_bytes, margin, refuses=refuses),
        margin=margin,
        users=users,
    )


def _on_gpus(
    placements: Mapping[str, Placement], devices: Mapping[str, DeviceType]
) -> dict[str, Placement]:
    return {name: own for name, own in placements.items() if devices[name] == "cuda"}


def _check_specs(config: Config, specs: Mapping[str, RoleSpec], num_ranks: int) -> None:
    check_engine(config, specs, num_ranks)
    for spec in specs.values():
        check_model(spec, specs, replays_routing=config.algorithm.routing_replay)


def _customs(
    users: Mapping[str, UserRole],
    placements: Mapping[str, Placement],
    devices: Mapping[str, DeviceType],
) -> dict[str, Custom]:
    """Facts about users' own roles for memory plans."""
    return {
        name: Custom(
            num_bytes=declared_bytes(user),
            device_type=devices[name],
            ranks=placements[name].ranks,
        )
        for name, user in users.items()
    }


def user_roles(config: Config) -> dict[str, UserRole]:
    """Make users' own roles from their classes.

    Raises:
        ValueError: a class cannot be made, or does not return the scores that a reward needs.
    """
    users = {
        name: make_user_role(name, config.role_kind(name), role.options)
        for name, role in config.roles.items()
        if config.is_users(name)
    }
    lists = (config.rewards, *(described.rewards for described in held_out_sets(config).values()))
    scoring = {reward.role for rewards in lists for reward in rewards if reward.role is not None}
    for name in scoring & users.keys():
        check_scores(name, users[name])
    return users


def _adapter_uses(
    config: Config, specs: Mapping[str, RoleSpec], syncs: Mapping[str, SyncPlan]
) -> dict[str, AdapterUse]:
    """Decide by rollout whether its engine has the policy's adapter merged.

    Args:
        syncs: those to engines that apply it unmerged, where they can.
    """
    policy = next((spec for spec in specs.values() if spec.kind == "policy"), None)
    if policy is None or policy.adapter is None:
        return {}
    return {name: adapter_use(config, policy, specs[name], sync) for name, sync in syncs.items()}


_SyncMaker = Callable[[HeldWeights, HeldWeights, frozenset[str]], SyncPlan]
"""Make the sync from a policy to a rollout; the names are those of merged weights."""


def _plan_syncs(
    specs: Mapping[str, RoleSpec], layouts: Mapping[str, WeightLayout], plans: _SyncMaker
) -> dict[str, SyncPlan]:
    """The sync from the policy to each rollout; none if there is no policy.

    A rollout without the policy's adapter gets weights that it is merged into.
    """
    policy = next((name for name, spec in specs.items() if spec.kind == "policy"), None)
    if policy is None:
        return {}
    adapter = specs[policy].adapter
    targets = frozenset(() if adapter is None else adapter.targets)
    return {
        name: plans(
            (specs[policy], layouts[policy]),
            (spec, layouts[name]),
            targets if spec.adapter is None else frozenset(),
        )
        for name, spec in specs.items()
        if spec.is_rollout
    }


def _plan_sync(
    node_size: int,
    bucket_bytes: int,
    source: HeldWeights,
    target: HeldWeights,
    merged: frozenset[str],
) -> SyncPlan:
    return plan_sync(
        source[1],
        target[1],
        node_size=node_size,
        bucket_bytes=bucket_bytes,
        share=shares_tensors(target[0]),
        merged=merged,
    )
