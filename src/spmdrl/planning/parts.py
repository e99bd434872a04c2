"""The parts of the roles on a rank (weights, optimizer, caches, graphs), with their bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from spmdrl.config.roles import PartResidency
from spmdrl.config.sections import Config
from spmdrl.config.shipped_flows import is_shipped
from spmdrl.memory.parts import Part, PartKey, ResidencyWish
from spmdrl.models.blocks.moe import has_fixed_shapes
from spmdrl.models.linear import LEAST_CAPABILITY
from spmdrl.models.local_shards import (
    Table,
    WeightLayout,
    counted,
    named_bytes,
    one_of_each,
    shard_of,
)
from spmdrl.planning.engines import vllm_cache
from spmdrl.planning.judge_bases import base_names
from spmdrl.planning.kv_cache import cache_sizes, reads_pages
from spmdrl.planning.systems.registry import train_system
from spmdrl.planning.systems.train_memory import TrainMemory
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.generation import GRAPHS, KV_CACHE
from spmdrl.roles.model_calls import BASE, OPTIMIZER, WEIGHTS
from spmdrl.rollout.native.workspace import why_graphs_go
from spmdrl.weights.plan import SyncPlan


@dataclass(frozen=True, kw_only=True)
class HeldModel:
    """A role's model, and the tensors of it that every rank holds.

    Args:
        layout: the tensors of each of its ranks; sharded weights that train are held in float32.
        state_layout: the masters and moments of each of its ranks.
        windowed: whether the optimizer stays on the host and steps in windows.
    """

    spec: RoleSpec
    layout: WeightLayout
    state_layout: WeightLayout
    windowed: bool = False


def held_models(
    specs: Mapping[str, RoleSpec],
    layouts: Mapping[str, WeightLayout],
    states: Mapping[str, WeightLayout],
) -> dict[str, HeldModel]:
    """The roles' models by name."""
    return {
        name: HeldModel(spec=spec, layout=layouts[name], state_layout=states[name])
        for name, spec in specs.items()
    }


def planned_parts(
    config: Config, here: Mapping[str, HeldModel], syncs: Mapping[str, SyncPlan], rank: int
) -> list[Part]:
    """The parts of all roles on the rank: those that others share come first, engines' last.

    Args:
        here: the roles with a model on this rank.
        syncs: by rollout, the plan that brings the policy's weights.

    Raises:
        ValueError: `roles.NAME.residency` asks of vLLM what it cannot do.
    """
    engines = {name: model for name, model in here.items() if model.spec.has_engine}
    models = [model for name, model in here.items() if name not in engines]
    policy = next((model for model in models if model.spec.kind == "policy"), None)
    parts = []
    for model in sorted(models, key=lambda model: model.spec.base is not None):
        parts += _model_parts(model, here, rank)
    for name, model in engines.items():
        base = model.spec.base
        owner = policy if base is None else here[base]
        shared = base_names(model.spec, model.layout[rank])
        if name in syncs:
            shared = syncs[name].shared.get(rank, frozenset())
        rests_on = () if owner is None else _parts_of(shared, owner, here, rank)
        table = model.layout[rank]
        size = table_bytes(table) - named_bytes(table, shared)
        own = _engine_parts(config, model.spec, size, rests_on)
        if name in syncs and _may_lose_weights(config, syncs[name]):
            own[0] = replace(own[0], may_lose=True)
        parts += own
        if uses_graphs(config, model):
            parts.append(_graphs(model.spec, captured_parts(model.spec, own[0])))
    return parts


def _may_lose_weights(config: Config, sync: SyncPlan) -> bool:
    """Whether the order of a step's calls is known, and each sync brings all that there is to hold:
    those of a user's own loop may be others, tensors that never change are sent only once, and a
    step that stops with the next one's samples begun (`lag`) resumes with the weights they have.
    """
    own = config.trainer is not None or config.environment is not None
    known = is_shipped(config.flow) and not own and config.lag == 0
    return known and sync.moves and not sync.frozen_rounds


def base_part(spec: RoleSpec, here: Mapping[str, HeldModel]) -> PartKey:
    """The part that holds the fixed weights under a role, or its own weights."""
    owner = spec if spec.base is None else here[spec.base].spec
    return owner.name, WEIGHTS if owner.adapter is None else BASE


def _parts_of(
    shared: Collection[str], owner: HeldModel, here: Mapping[str, HeldModel], rank: int
) -> tuple[PartKey, ...]:
    """The parts that own those of a model's tensors that an engine shares."""
    table = owner.layout.get(rank, {})
    base, own = base_part(owner.spec, here), (owner.spec.name, WEIGHTS)
    found = [base if shard_of(table, local).frozen else own for local in shared]
    return tuple(key for key in dict.fromkeys((base, own)) if key in found)


def _wish(spec: RoleSpec, part: str) -> ResidencyWish:
    wish = part_residency(spec, part)
    return "keep" if wish == "stream" else wish


def part_residency(spec: RoleSpec, part: str) -> PartResidency:
    """The residency that the role's section asks for."""
    wishes: Mapping[str, PartResidency] = {str(k): v for k, v in spec.section.residency.items()}
    return wishes.get(part, "auto")


def _model_parts(model: HeldModel, here: Mapping[str, HeldModel], rank: int) -> list[Part]:
    spec, held = model.spec, counted(model.layout[rank])
    base, parts = base_part(spec, here), []
    if base == (spec.name, BASE):
        size = sum(shard.num_bytes * count for shard, count in held if shard.frozen)
        wish = _wish(spec, BASE)
        parts.append(Part(role=spec.name, name=BASE, num_bytes=size, wish=wish, frozen=True))
    rests_on = () if base == (spec.name, WEIGHTS) else (base,)
    own = [(shard, count) for shard, count in held if not (rests_on and shard.frozen)]
    parts.append(
        Part(
            role=spec.name,
            name=WEIGHTS,
            num_bytes=sum(shard.num_bytes * count for shard, count in own),
            wish=_wish(spec, WEIGHTS),
            frozen=not spec.trained,
            rests_on=rests_on,
        )
    )
    held_so = train_memory(model, rank)
    if spec.trained:
        wish = _wish(spec, OPTIMIZER)
        size = held_so.optimizer
        parts.append(Part(role=spec.name, name=OPTIMIZER, num_bytes=size, wish=wish))
    return [
        replace(p, num_bytes=0, on_host=p.num_bytes, wish="keep")  # nothing of it moves
        if p.name in held_so.offloads
        else p
        for p in parts
    ]


def train_memory(model: HeldModel, rank: int) -> TrainMemory:
    """The bytes that the role's training system adds to a rank."""
    weights, states = model.layout[rank], model.state_layout[rank]
    held = train_system(model.spec).memory(model.spec, weights, states)
    return replace(held, offloads=held.offloads | {OPTIMIZER}) if model.windowed else held


def _engine_parts(
    config: Config, spec: RoleSpec, weights_bytes: int, rests_on: tuple[PartKey, ...]
) -> list[Part]:
    weights = Part(
        role=spec.name,
        name=WEIGHTS,
        num_bytes=weights_bytes,
        wish=_wish(spec, WEIGHTS),
        frozen=spec.is_judge,  # no sync fills them
        rests_on=rests_on,
    )
    cache = Part(
        role=spec.name,
        name=KV_CACHE,
        num_bytes=cache_bytes(config, spec),
        wish=_wish(spec, KV_CACHE),
        droppable=True,
    )
    if not spec.is_vllm:
        return [weights, cache]
    if spec.device_type == "cpu":  # vLLM cannot free memory there
        return [replace(weights, wish="keep"), replace(cache, wish="keep")]
    for part in (KV_CACHE, GRAPHS):
        if (wish := _wish(spec, part)) != "auto":
            raise ValueError(
                f"roles.{spec.name}.residency.{part}={wish} with rollout.engine=vllm: vLLM frees "
                "its cache with its weights and keeps its graphs, so set "
                f"roles.{spec.name}.residency.weights only"
            )
    # its sleep frees weights and cache together
    return [replace(weights, num_bytes=weights_bytes + cache.num_bytes)]


def captured_parts(spec: RoleSpec, weights: Part) -> tuple[PartKey, ...]:
    """Parts whose addresses a native engine's graphs hold and which may come back elsewhere: those
    of other roles that it computes with, and its own where they cannot keep their addresses.

    Args:
        weights: the engine's.
    """
    # a host without a GPU plans for GPUs whose drivers map memory
    device = spec.device if torch.cuda.is_available() else None
    if why_graphs_go(spec.model, device) is None:
        return weights.rests_on
    return (weights.key, (spec.name, KV_CACHE))


def _graphs(spec: RoleSpec, holds: tuple[PartKey, ...]) -> Part:
    wish = _wish(spec, GRAPHS)
    return Part(
        role=spec.name,
        name=GRAPHS,
        num_bytes=0,
        wish=wish,
        droppable=True,
        is_capture=True,
        holds=holds,
    )


def uses_graphs(config: Config, model: HeldModel) -> bool:
    """Whether the rollout's decode steps are captured, which holds addresses that may move."""
    spec = model.spec
    if spec.is_vllm:
        return False
    # a host without a GPU plans for GPUs that torch's kernels support
    capability = None if torch.cuda.is_available() else LEAST_CAPABILITY
    table = one_of_each(next(iter(model.layout.values())))
    shapes = {name: held.shape for name, held in table.items()}
    usable = reads_pages(spec)
    fixed = has_fixed_shapes(spec.model, shapes, spec.dtype, spec.device, capability)
    return config.rollout.cuda_graphs and usable and fixed and not spec.shares_experts


def table_bytes(table: Table) -> int:
    """Bytes of a rank's tensors."""
    return sum(held.num_bytes * count for held, count in counted(table))


def cache_bytes(config: Config, spec: RoleSpec) -> int:
    """Bytes of one rank's KV cache: as configured, or as much as a step's samples can need."""
    return vllm_cache(config, spec).num_bytes if spec.is_vllm else cache_sizes(config, spec).step
