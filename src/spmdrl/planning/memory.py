"""The memory plan of a configuration: the parts of its roles on each rank, and their moves.

Everything here is a function of the configuration and the models' shapes, so that every rank knows
every rank's plan, and all refuse alike what does not fit, before anything is loaded.

The memory plans of all ranks as texts, for `plan` and the start of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import format_ranks
from spmdrl.memory.parts import Part, size_text
from spmdrl.memory.plan import MemoryPlan, fits, make_plan
from spmdrl.memory.schedule import PlannedCall
from spmdrl.planning.alike import TableClasses
from spmdrl.planning.kv_cache import cache_sizes, grown, shrunk
from spmdrl.planning.margins import Margin
from spmdrl.planning.parts import HeldModel, part_residency, planned_parts, train_memory
from spmdrl.planning.step_calls import halves, planned_calls, unusual_steps, usual_step
from spmdrl.planning.systems.registry import train_system
from spmdrl.planning.systems.train_memory import trained_bytes
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.custom import DECLARED, Custom
from spmdrl.roles.generation import KV_CACHE
from spmdrl.roles.model_calls import OPTIMIZER
from spmdrl.weights.plan import SyncPlan
from spmdrl.world import free_bytes


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory plan of one rank.

    Args:
        plan: the rank's plan.
        working_bytes: by call (`policy.update`), its bytes on the device in addition to parts.
        syncs_from_host: weight syncs do not need the policy's weights on the device.
        splits: the roles whose optimizer is on the device only while it steps, since it does not
            fit there with the activations of the passes.
        windowed: bytes of the optimizers that stay on the host and pass through the device in
            windows while they step, by role.
    """

    plan: MemoryPlan
    working_bytes: Mapping[str, int]
    syncs_from_host: bool
    splits: frozenset[str] = frozenset()
    windowed: Mapping[str, int] = field(default_factory=dict)


def plan_memory(
    config: Config,
    models: Mapping[str, HeldModel],
    customs: Mapping[str, Custom],
    syncs: Mapping[str, SyncPlan],
    device_types: Sequence[str],
    gpu_bytes: int | None,
    margin: Margin,
    *,
    refuses: bool = True,
) -> dict[int, RankMemory]:
    """Every rank's plan; ranks with equal roles share one.

    A role on the host of a rank with a GPU uses no device memory and is in no plan.

    Args:
        models: the roles with a model.
        customs: users' own roles.
        syncs: by rollout, the plan that brings the policy's weights.
        device_types: device type of every rank of the world.
        gpu_bytes: the free memory of the world's fullest GPU (None for this host's), so that all
            ranks make one plan, and refuse alike what does not fit.
        margin: the memory of a GPU that roles may not fill.
        refuses: False: also plan what does not fit, with all away that may go.

    Raises:
        ValueError: a call cannot fit on some rank's device; sizes are given.
    """
    placed = (*[tuple(m.layout) for m in models.values()], *[c.ranks for c in customs.values()])
    classes = TableClasses()
    made: dict[object, RankMemory] = {}
    plans = {}
    for rank in sorted({rank for ranks in placed for rank in ranks}):
        here = {
            name: model
            for name, model in models.items()
            if rank in model.layout and model.spec.device_type == device_types[rank]
        }
        own = {
            name: custom.num_bytes
            for name, custom in customs.items()
            if rank in custom.ranks and custom.device_type == device_types[rank]
        }
        key = (
            *[(name, *_same_for(model, rank, classes)) for name, model in here.items()],
            *[syncs[name].shared.get(rank) for name in here if name in syncs],
            *own,
        )
        if key not in made:
            capacity = device_bytes(config, device_types[rank], gpu_bytes, margin)
            made[key] = _on_rank(config, here, own, syncs, rank, capacity, refuses=refuses)
        plans[rank] = made[key]
    return plans


def _same_for(model: HeldModel, rank: int, classes: TableClasses) -> tuple[int, int]:
    """Key of the sizes of a role's parts: the table's, and the bytes of a state cut otherwise."""
    weights, states = model.layout[rank], model.state_layout[rank]
    size = 0 if states is weights else trained_bytes(states)
    return classes.number(weights), size


def _on_rank(
    config: Config,
    here: Mapping[str, HeldModel],
    customs: Mapping[str, int | None],
    syncs: Mapping[str, SyncPlan],
    rank: int,
    capacity: int | None,
    *,
    refuses: bool,
) -> RankMemory:
    here = {n: replace(m, windowed=_asks_for_windows(m, rank)) for n, m in here.items()}
    parts = _parts(config, here, customs, syncs, rank)
    calls = planned_calls(config, here, syncs, rank, customs)
    if too_large := _too_large(here, parts, calls.update, rank, capacity):
        here = {n: replace(m, windowed=m.windowed or n in too_large) for n, m in here.items()}
        parts = _parts(config, here, customs, syncs, rank)
        calls = planned_calls(config, here, syncs, rank, customs)
    # if both do not fit, the sync reads the policy's weights from the host
    from_host = not all(fits(parts, sync, capacity) for sync in calls.sync)
    splits = _splits(here, parts, calls.update, rank, capacity)
    if from_host or splits:
        calls = planned_calls(
            config, here, syncs, rank, customs, syncs_from_host=from_host, splits=splits
        )
    step, others = usual_step(config, calls), unusual_steps(config, calls)
    plan_of = partial(
        make_plan, calls=step, capacity=capacity, rank=rank, other_steps=others, refuses=refuses
    )
    sizes = {
        (name, KV_CACHE): cache_sizes(config, model.spec)
        for name, model in here.items()
        if model.spec.has_engine and not model.spec.is_vllm
    }
    plan = plan_of(shrunk(parts, (*calls.generate, *calls.score), capacity, sizes))
    larger = grown(plan, sizes)
    if larger != list(plan.parts) and _moves_alike(second := plan_of(larger), plan):
        plan = second
    return RankMemory(
        plan=plan,
        working_bytes={call.name: call.working_bytes for call in step},
        syncs_from_host=from_host,
        splits=splits,
        windowed={
            name: train_memory(model, rank).optimizer
            for name, model in here.items()
            if model.windowed
        },
    )


def _parts(
    config: Config,
    here: Mapping[str, HeldModel],
    customs: Mapping[str, int | None],
    syncs: Mapping[str, SyncPlan],
    rank: int,
) -> list[Part]:
    parts = planned_parts(config, here, syncs, rank)
    for name, size in customs.items():
        if size is not None:
            fixed = Part(role=name, name=DECLARED, num_bytes=size, wish="keep", fixed=True)
            parts.append(fixed)
    return parts


def _asks_for_windows(model: HeldModel, rank: int) -> bool:
    """Whether the role's section has its optimizer stay on the host and step in windows.

    Raises:
        ValueError: its training system cannot.
    """
    spec = model.spec
    if not spec.trained or part_residency(spec, OPTIMIZER) != "stream":
        return False
    if not train_memory(model, rank).can_stream:
        raise ValueError(
            f"roles.{spec.name}.residency.optimizer=stream: train.backend={spec.train.backend} "
            "cannot step in windows, only torch can: set host or auto"
        )
    return True


def _too_large(
    here: Mapping[str, HeldModel],
    parts: Sequence[Part],
    updates: Sequence[PlannedCall],
    rank: int,
    capacity: int | None,
) -> frozenset[str]:
    """The roles whose update does not fit with their optimizer, which may go to the host and whose
    system can step in windows.
    """
    found = set()
    for update in updates:
        model = here[role := update.name.removesuffix(".update")]
        if model.windowed or part_residency(model.spec, OPTIMIZER) not in ("auto", "host"):
            continue
        if train_memory(model, rank).can_stream and not fits(parts, update, capacity):
            found.add(role)
    return frozenset(found)


def _splits(
    here: Mapping[str, HeldModel],
    parts: Sequence[Part],
    updates: Sequence[PlannedCall],
    rank: int,
    capacity: int | None,
) -> frozenset[str]:
    """The roles whose update does not fit with the optimizer on the device during all of it, and
    does if that comes for its steps.
    """
    found = set()
    for update in updates:
        role = update.name.removesuffix(".update")
        if not train_system(here[role].spec).splits_optimizer or fits(parts, update, capacity):
            continue
        gradients = train_memory(here[role], rank).gradients
        if all(fits(parts, half, capacity) for half in halves(update, gradients)):
            found.add(role)
    return frozenset(found)


def _moves_alike(second: MemoryPlan, first: MemoryPlan) -> bool:
    """Whether the second plan moves what the first does, and no later."""
    ahead = [[call.prefetch for call in plan.calls] for plan in (first, second)]
    return second.residencies == first.residencies and ahead[0] == ahead[1]


def cache_limit(memory: Mapping[int, RankMemory], spec: RoleSpec) -> int | None:
    """Most bytes of a rollout's cache on each of its ranks, which schedule alike; None: any."""
    found = [
        part.num_bytes
        for rank in spec.placement.ranks
        if rank in memory and memory[rank].plan.capacity is not None
        for part in memory[rank].plan.parts
        if part.key == (spec.name, KV_CACHE)
    ]
    return min(found, default=None)


def device_bytes(
    config: Config, device_type: str, gpu_bytes: int | None, margin: Margin
) -> int | None:
    """Bytes of a rank's device that roles may fill; None without a bound (CPU, no `memory_gb`)."""
    if config.memory_gb is not None:
        return int(config.memory_gb * 1e9)
    if device_type != "cuda":
        return None
    if gpu_bytes is None and torch.cuda.is_available():  # not on a host without GPUs
        gpu_bytes = free_bytes(torch.device("cuda", 0))
    return None if gpu_bytes is None else margin.room(gpu_bytes)


def schedules(memory: Mapping[int, RankMemory]) -> list[str]:
    """The schedules of all ranks, each one once for all ranks that share it."""
    ranks: dict[str, list[int]] = {}
    plans = {}
    for rank, own in memory.items():
        ranks.setdefault(text := own.plan.describe(""), []).append(rank)
        plans[text] = own.plan
    names = {t: f"rank{'s' * (len(own) > 1)} {format_ranks(own)}" for t, own in ranks.items()}
    return [plan.describe(names[text]) for text, plan in plans.items()]


def memory_texts(memory: Mapping[int, RankMemory]) -> dict[str, str]:
    """Role -> sizes and residencies of its parts, on the rank with the most bytes of the role."""
    most: dict[str, tuple[int, str]] = {}
    for plan in (rank.plan for rank in memory.values()):
        by_role: dict[str, list[Part]] = {}
        for part in plan.parts:
            by_role.setdefault(part.role, []).append(part)
        for role, own in by_role.items():
            shown = [_part_text(part, plan) for part in own]
            found = (sum(part.num_bytes + part.on_host for part in own), ", ".join(shown))
            if role not in most or found[0] > most[role][0]:
                most[role] = found
    return {role: text for role, (_, text) in most.items()}


def _part_text(part: Part, plan: MemoryPlan) -> str:
    if part.on_host:
        return f"{part.name} {size_text(part.on_host)} stays on the host"
    return f"{part.name} {size_text(part.num_bytes)} {plan.residencies[part.key]}"
