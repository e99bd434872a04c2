"""The memory plan of a configuration: the parts of its roles on each rank, and their moves.

Everything here is a function of the configuration and the models' shapes, so that every rank knows
every rank's plan, and all refuse alike what does not fit, before anything is loaded.

The memory plans of all ranks as texts, for `explain` and the start of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import format_ranks
from spmdrl.memory.parts import Part, size_text
from spmdrl.memory.plan import MemoryPlan, fits, make_plan
from spmdrl.planning.parts import HeldModel, optimizer_bytes, planned_parts
from spmdrl.planning.step_calls import planned_calls, unusual_steps, usual_step
from spmdrl.roles.custom import DECLARED, Custom
from spmdrl.weights.plan import SyncPlan
from spmdrl.world import free_bytes

FREE_SHARE = 0.9
"""Share of a device's free memory that roles may fill. The rest is for what no part counts: NCCL's
buffers (up to some hundred MB per group), workspaces of matrix products, the sampler's noise and
logits, captured graphs, and fragments.
"""


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
    models: Mapping[str, HeldModel],
    customs: Mapping[str, Custom],
    syncs: Mapping[str, SyncPlan],
    device_types: Sequence[str],
    gpu_bytes: int | None,
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

    Raises:
        ValueError: a call cannot fit on some rank's device; sizes are given.
    """
    placed = (*[tuple(m.layout) for m in models.values()], *[c.ranks for c in customs.values()])
    made: dict[tuple[tuple[str, int, int], ...], RankMemory] = {}
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
        key = tuple((name, *_same_for(model, rank)) for name, model in here.items())
        key += tuple((name, -1, 0) for name in own)
        if key not in made:
            capacity = device_bytes(config, device_types[rank], gpu_bytes)
            made[key] = _on_rank(config, here, own, syncs, rank, capacity)
        plans[rank] = made[key]
    return plans


def _same_for(model: HeldModel, rank: int) -> tuple[int, int]:
    """Key of the sizes of a role's parts: the table, and the bytes of a state cut otherwise."""
    weights, states = model.layout[rank], model.state_layout[rank]
    return id(weights), 0 if states is weights else optimizer_bytes(weights, states)


def _on_rank(
    config: Config,
    here: Mapping[str, HeldModel],
    customs: Mapping[str, int | None],
    syncs: Mapping[str, SyncPlan],
    rank: int,
    capacity: int | None,
) -> RankMemory:
    parts = planned_parts(config, here, syncs, rank)
    for name, size in customs.items():
        if size is not None:
            fixed = Part(role=name, name=DECLARED, num_bytes=size, wish="keep", fixed=True)
            parts.append(fixed)
    calls = planned_calls(config, here, syncs, rank, customs)
    # if both do not fit, the sync reads the policy's weights from the host
    streams = not all(fits(parts, sync, capacity) for sync in calls.sync)
    if streams:
        calls = planned_calls(config, here, syncs, rank, customs, streams=True)
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
        gpu_bytes = free_bytes(torch.device("cuda", 0))
    return None if gpu_bytes is None else int(gpu_bytes * FREE_SHARE)


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
            shown = [f"{p.name} {size_text(p.num_bytes)} {plan.residencies[p.key]}" for p in own]
            found = (sum(part.num_bytes for part in own), ", ".join(shown))
            if role not in most or found[0] > most[role][0]:
                most[role] = found
    return {role: text for role, (_, text) in most.items()}
