"""The memory plan of a configuration: the parts of its roles on each rank, and their moves.

Everything here is a function of the configuration and the models' shapes, so that every rank knows
every rank's plan, and all refuse alike what does not fit, before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from spmdrl.config.sections import Config
from spmdrl.memory.parts import Part, PartKey, ResidencyWish
from spmdrl.memory.plan import MemoryPlan, fits, make_plan
from spmdrl.memory.schedule import PlannedCall
from spmdrl.models.config import ModelConfig
from spmdrl.models.moe import has_fixed_shapes
from spmdrl.models.sharding import Head
from spmdrl.placement import Placement
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.planning.engines import engine_parts, is_vllm, vllm_cache
from spmdrl.planning.step_calls import RankCalls, in_read_order, unusual_steps, usual_step
from spmdrl.planning.token_bounds import microbatch_tokens, step_sizes
from spmdrl.roles.custom import DECLARED, FORWARD, Custom
from spmdrl.roles.generation import GRAPHS, KV_CACHE
from spmdrl.roles.model_calls import OPTIMIZER, WEIGHTS
from spmdrl.roles.policy_sync import SYNC
from spmdrl.rollout.native.blocked import MIN_STEPS
from spmdrl.rollout.native.varlen import varlen_is_usable
from spmdrl.weights.layout import Table, WeightLayout
from spmdrl.weights.plan import NUM_SLOTS, SyncPlan

FREE_SHARE = 0.9
"""Share of a device's memory that roles may fill; the rest is for libraries and fragments."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The plan's input about a role.

    Args:
        layout: the tensors of each of its ranks.
        state_layout: the masters and moments of each of its ranks.
        device: device that it computes on, without an index.
        dtype: dtype that it computes in; sharded weights are held in float32.
    """

    kind: str
    config: ModelConfig
    head: Head
    layout: WeightLayout
    state_layout: WeightLayout
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory plan of one rank.

    Args:
        plan: the rank's plan.
        working_bytes: by call (`policy.update`), its bytes on the device in addition to parts.
        streams: weight syncs do not need the policy's weights on the device.
    """

    plan: MemoryPlan
    working_bytes: Mapping[str, int]
    streams: bool


def plan_memory(
    config: Config,
    placements: Mapping[str, Placement],
    shapes: Mapping[str, Shape],
    syncs: Mapping[str, SyncPlan],
    device_types: Sequence[str],
    customs: Mapping[str, Custom],
    gpu_bytes: int | None,
) -> dict[int, RankMemory]:
    """Every rank's plan; ranks with equal roles share one.

    A role on the host of a rank with a GPU uses no device memory and is in no plan.

    Args:
        syncs: by rollout, the plan that brings the policy's weights.
        device_types: device type of every rank of the world.
        gpu_bytes: the memory of the world's smallest GPU (None for this host's), so that all ranks
            make one plan, and refuse alike what does not fit.

    Raises:
        ValueError: a call cannot fit on some rank's device; sizes are given.
    """
    ranks = sorted({rank for placement in placements.values() for rank in placement.ranks})
    made: dict[tuple[tuple[str, int, int], ...], RankMemory] = {}
    plans = {}
    for rank in ranks:
        here = {
            name: shape
            for name, shape in shapes.items()
            if rank in shape.layout and shape.device.type == device_types[rank]
        }
        own = {
            name: custom.num_bytes
            for name, custom in customs.items()
            if rank in placements[name].ranks and custom.device.type == device_types[rank]
        }
        key = tuple((name, *_same_for(shape, rank)) for name, shape in here.items())
        key += tuple((name, -1, 0) for name in own)
        if key not in made:
            capacity = device_bytes(config, device_types[rank], gpu_bytes)
            made[key] = _on_rank(config, placements, here, own, syncs, rank, capacity)
        plans[rank] = made[key]
    return plans


def _same_for(shape: Shape, rank: int) -> tuple[int, int]:
    """Key of the sizes of a role's parts: the table, and the bytes of a state cut otherwise."""
    weights, states = shape.layout[rank], shape.state_layout[rank]
    return id(weights), 0 if states is weights else optimizer_bytes(weights, states)


def _on_rank(
    config: Config,
    placements: Mapping[str, Placement],
    here: Mapping[str, Shape],
    customs: Mapping[str, int | None],
    syncs: Mapping[str, SyncPlan],
    rank: int,
    capacity: int | None,
) -> RankMemory:
    parts = _parts(config, placements, here, syncs, rank)
    for name, size in customs.items():
        if size is not None:
            fixed = Part(role=name, name=DECLARED, num_bytes=size, wish="keep", fixed=True)
            parts.append(fixed)
    calls = _calls(config, placements, here, syncs, rank, customs)
    # if both do not fit, the sync reads the policy's weights from the host
    streams = not all(fits(parts, sync, capacity) for sync in calls.sync)
    if streams:
        calls = _calls(config, placements, here, syncs, rank, customs, streams=True)
    step, others = usual_step(config, calls), unusual_steps(config, calls)
    return RankMemory(
        plan=make_plan(parts, step, capacity=capacity, rank=rank, other_steps=others),
        working_bytes={call.name: call.working_bytes for call in step},
        streams=streams,
    )


def device_bytes(config: Config, device_type: str, gpu_bytes: int | None) -> int | None:
    """Bytes of a rank's device that roles may fill; None without a bound (CPU, no `memory_gb`)."""
    if config.memory_gb is not None:
        return int(config.memory_gb * 1e9)
    if device_type != "cuda":
        return None
    if gpu_bytes is None and torch.cuda.is_available():  # not on a host without GPUs
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    return None if gpu_bytes is None else int(gpu_bytes * FREE_SHARE)


def _wish(config: Config, role: str, part: str) -> ResidencyWish:
    wishes: Mapping[str, ResidencyWish] = {str(k): v for k, v in config.roles[role].memory.items()}
    return wishes.get(part, "auto")


def _parts(
    config: Config,
    placements: Mapping[str, Placement],
    here: Mapping[str, Shape],
    syncs: Mapping[str, SyncPlan],
    rank: int,
) -> list[Part]:
    """The parts of all roles on the rank; trained models, which a rollout may share, come first."""
    parts = []
    for name in (n for n, shape in here.items() if shape.kind != "rollout"):
        table = here[name].layout[rank]
        trained = config.is_trained(name)
        parts.append(
            Part(
                role=name,
                name=WEIGHTS,
                num_bytes=_bytes(table),
                wish=_wish(config, name, WEIGHTS),
                frozen=not trained,
            )
        )
        if trained:
            wish = _wish(config, name, OPTIMIZER)
            size = optimizer_bytes(table, here[name].state_layout[rank])
            parts.append(Part(role=name, name=OPTIMIZER, num_bytes=size, wish=wish))
    policy = next((n for n, shape in here.items() if shape.kind == "policy"), None)
    for name in (n for n, shape in here.items() if shape.kind == "rollout"):
        parts += _rollout_parts(config, placements[name], name, here[name], syncs, rank, policy)
        if uses_graphs(config, name, here[name]):
            holds: tuple[PartKey, ...] = ((name, WEIGHTS), (name, KV_CACHE))
            wish = _wish(config, name, GRAPHS)
            parts.append(
                Part(role=name, name=GRAPHS, num_bytes=0, wish=wish, droppable=True, holds=holds)
            )
    return parts


def _rollout_parts(
    config: Config,
    placement: Placement,
    name: str,
    shape: Shape,
    syncs: Mapping[str, SyncPlan],
    rank: int,
    policy: str | None,
) -> list[Part]:
    table = shape.layout[rank]
    shared = syncs[name].shared.get(rank, frozenset()) if name in syncs else frozenset()
    own = {local: held for local, held in table.items() if local not in shared}
    rests_on: tuple[PartKey, ...] = ((policy, WEIGHTS),) if policy and shared else ()
    if is_vllm(config, name):
        size = cache_bytes(config, name, placement, shape)
        return _vllm_parts(config, name, shape, _bytes(own), size, rests_on)
    return [
        Part(
            role=name,
            name=WEIGHTS,
            num_bytes=_bytes(own),
            wish=_wish(config, name, WEIGHTS),
            rests_on=rests_on,
        ),
        Part(
            role=name,
            name=KV_CACHE,
            num_bytes=cache_bytes(config, name, placement, shape),
            wish=_wish(config, name, KV_CACHE),
            droppable=True,
        ),
    ]


def _vllm_parts(
    config: Config,
    name: str,
    shape: Shape,
    weights_bytes: int,
    cache_bytes: int,
    rests_on: tuple[PartKey, ...],
) -> list[Part]:
    """The parts of a vLLM rollout; its sleep frees weights and cache together (none on a CPU)."""
    weights = Part(role=name, name=WEIGHTS, num_bytes=weights_bytes, wish="keep", rests_on=rests_on)
    if shape.device.type == "cpu":
        cache = Part(role=name, name=KV_CACHE, num_bytes=cache_bytes, wish="keep", droppable=True)
        return [weights, cache]
    for part in (KV_CACHE, GRAPHS):
        if (wish := _wish(config, name, part)) != "auto":
            raise ValueError(
                f"roles.{name}.memory.{part}={wish} with rollout.engine=vllm: vLLM frees its cache "
                f"with its weights and keeps its graphs, so set roles.{name}.memory.weights alone"
            )
    return [
        replace(weights, num_bytes=weights_bytes + cache_bytes, wish=_wish(config, name, WEIGHTS))
    ]


def uses_graphs(config: Config, name: str, shape: Shape) -> bool:
    """Whether the rollout's decode steps are captured, which holds addresses that may move."""
    if is_vllm(config, name):
        return False
    if shape.device.type == "cuda" and not torch.cuda.is_available():
        return False  # a rank without a GPU plans for one that has it: only its own plan counts
    shapes = {name: held.shape for name, held in next(iter(shape.layout.values())).items()}
    usable = varlen_is_usable(shape.dtype, shape.config.head_dim, shape.device)
    fixed = has_fixed_shapes(shape.config, shapes, shape.dtype, shape.device)
    return config.rollout.cuda_graphs and usable and fixed


def _calls(
    config: Config,
    placements: Mapping[str, Placement],
    here: Mapping[str, Shape],
    syncs: Mapping[str, SyncPlan],
    rank: int,
    customs: Iterable[str],
    *,
    streams: bool = False,
) -> RankCalls:
    """The calls of the roles on this rank in a step.

    Args:
        streams: the sync reads the policy's weights from the host.
    """
    kinds = {name: shape.kind for name, shape in here.items()}
    rollouts = [name for name, kind in kinds.items() if kind == "rollout"]
    generate = []
    for name in rollouts:
        captured = uses_graphs(config, name, here[name])
        parts = engine_parts(config, name, here[name].device, captures_graphs=captured)
        needs = tuple((name, part) for part in parts)
        work = 0 if is_vllm(config, name) else _blocked_bytes(config, here[name], rank)
        generate.append(PlannedCall(name=f"{name}.generate", needs=needs, working_bytes=work))
    # memory of a user's own role stays on the device
    score = {name: PlannedCall(name=f"{name}.{FORWARD}", needs=()) for name in customs}
    scoring = [reward.role for reward in config.rewards if reward.role is not None]
    read: list[PlannedCall] = []
    update = []
    for name in in_read_order(kinds):
        method = {"reward": "score", "value": "values"}.get(kinds[name], "logprobs")
        work = _working_bytes(config, placements[name], name, here[name], backward=False)
        call = PlannedCall(name=f"{name}.{method}", needs=((name, WEIGHTS),), working_bytes=work)
        if name in scoring:
            score[name] = call
        else:
            read.append(call)
        if config.is_trained(name):
            work = _working_bytes(config, placements[name], name, here[name], backward=True)
            work += gradient_bytes(here[name].layout[rank])
            needs = ((name, WEIGHTS), (name, OPTIMIZER))
            update.append(PlannedCall(name=f"{name}.update", needs=needs, working_bytes=work))
    return RankCalls(
        sync=tuple(_sync_call(kinds, syncs, streams=streams)),
        generate=tuple(generate),
        score=tuple(score[name] for name in scoring if name in score),
        read=tuple(read),
        update=tuple(update),
    )


def _sync_call(
    kinds: Mapping[str, str], syncs: Mapping[str, SyncPlan], *, streams: bool
) -> Iterator[PlannedCall]:
    """The call that fills the rollouts' weights, if this rank takes part in one."""
    moving = [name for name, sync in syncs.items() if sync.moves]
    source = tuple((name, WEIGHTS) for name, kind in kinds.items() if kind == "policy" and moving)
    target = tuple((name, WEIGHTS) for name in moving if name in kinds)
    if source or target:
        staged = [NUM_SLOTS * syncs[name].slot_bytes for name in moving if syncs[name].moved_bytes]
        needs = () if streams else source
        work = max(staged, default=0)
        yield PlannedCall(name=SYNC, needs=needs, fills=target, working_bytes=work)


def _blocked_bytes(config: Config, shape: Shape, rank: int) -> int:
    """Bytes of the copy of its weights that a native engine decodes with on a CPU."""
    pays = config.sampling.max_tokens >= MIN_STEPS
    is_served = shape.device.type == "cpu" and shape.dtype == torch.float32
    return _bytes(shape.layout[rank]) if pays and is_served else 0


def _working_bytes(
    config: Config, placement: Placement, name: str, shape: Shape, *, backward: bool
) -> int:
    return working_bytes(
        shape.config,
        config.train_section(name),
        placement.degrees,
        shape.dtype,
        shape.device,
        shape.head,
        microbatch_tokens(config, name, placement, update=backward),
        backward=backward,
    )


def _bytes(table: Table) -> int:
    return sum(held.num_bytes for held in table.values())


def optimizer_bytes(weights: Table, states: Table) -> int:
    """Bytes of AdamW's two moments in float32, and of the masters if the weights are narrower."""
    narrow = {name: held for name, held in weights.items() if held.dtype != torch.float32}
    # FSDP's shards are float32, tensors that it does not cut may be narrower; else all have one
    # dtype
    masters = narrow if len(narrow) < len(weights) else states
    return 2 * _trained_bytes(states) + _trained_bytes(masters)


def gradient_bytes(table: Table) -> int:
    """Bytes of float32 gradients, without the short-lived ones in the dtype of narrower weights."""
    return _trained_bytes(table)


def _trained_bytes(table: Table) -> int:
    return sum(4 * math.prod(held.shape) for held in table.values() if not held.frozen)


def cache_bytes(config: Config, name: str, placement: Placement, shape: Shape) -> int:
    """Bytes of one rank's KV cache: as configured, or as much as a step's samples can need."""
    rollout, model = config.rollout, shape.config
    if is_vllm(config, name):
        return vllm_cache(
            config,
            model,
            shape.dtype,
            shape.device.type,
            num_replicas=placement.num_replicas,
            tp=placement.degrees["tp"],
        ).num_bytes
    if rollout.kv_cache_gb != "auto":
        return int(rollout.kv_cache_gb * 1e9)
    samples = -(-config.data.prompts_per_step * config.data.group_size // placement.num_replicas)
    tokens = config.data.train.max_tokens + config.sampling.max_tokens
    if config.data_kind() == "prompts":
        tokens = step_sizes(config).row_tokens
    heads = max(1, model.num_kv_heads // placement.degrees["tp"])
    per_token = 2 * model.num_layers * heads * model.head_dim * shape.dtype.itemsize
    return min(samples, rollout.max_running) * tokens * per_token
