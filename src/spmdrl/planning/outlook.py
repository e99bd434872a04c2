"""`Outlook`: all that `spmdrl plan` says of a run on a machine, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spmdrl.config.sections import Config
from spmdrl.memory.parts import dotted
from spmdrl.memory.plan import MemoryPlan
from spmdrl.planning.forecast.forecast import forecast_step
from spmdrl.planning.forecast.machine import Machine
from spmdrl.planning.forecast.step import CallForecast, Lengths, StepForecast
from spmdrl.planning.host_memory import HostMemory, host_memory
from spmdrl.planning.margins import CONTEXT_BYTES
from spmdrl.planning.plan import RolePlan

IDLE_POWER = 0.15
"""Share of a device's power that it takes while it waits: H200s idle at 74-122 of 700 W."""

_RECOMPUTED = 4 / 3
"""Operations of an update with `recompute=layer` per those that the model needs: a second forward
pass beside one forward and two of the backward pass.
"""

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Memory, seconds, energy and cost of a step.

    Args:
        forecast: None if the plan does not fit.
        lengths: the rows' tokens that the seconds are for.
        price: price of an hour of one device, if given.
    """

    config: Config
    plan: RolePlan
    machine: Machine
    lengths: Lengths
    forecast: StepForecast | None
    host: HostMemory
    price: float | None = None

    @property
    def device_fits(self) -> bool:
        return all(own.plan.fits for own in self.plan.memory.values())

    @property
    def fits(self) -> bool:
        """Whether devices and hosts have enough memory."""
        return self.device_fits and self.host.total <= self.machine.host_bytes

    @property
    def peak_bytes(self) -> int:
        """Parts and working memory of the fullest device."""
        return max((own.plan.peak_bytes for own in self.plan.memory.values()), default=0)

    @property
    def capacity(self) -> int | None:
        """Bytes that parts and working memory may take on the fullest device."""
        found = [own.plan.capacity for own in self.plan.memory.values()]
        return min((size for size in found if size is not None), default=None)

    @property
    def taken_bytes(self) -> dict[str, int]:
        """Bytes of a GPU that roles may not fill, by cause."""
        if self.machine.device.kind == "cpu":
            return {}
        margin, context = self.plan.margin, CONTEXT_BYTES
        return {
            "context": context,
            "nccl": margin.nccl_bytes,
            "workspaces": margin.workspace_bytes,
            "fragments": margin.fragment_bytes(self.machine.device.memory_bytes - context),
        }

    def rate_of(self, call: CallForecast) -> float:
        """Products per second of a role's dtype at the device's peak."""
        dtype = str(self.plan.specs[call.role].dtype).removeprefix("torch.")
        return self.machine.device.flops[dtype]

    def model_flops(self, call: CallForecast) -> float:
        """Operations of a call on one rank that the model needs, without those made again."""
        spec = self.plan.specs[call.role]
        again = call.call == "update" and spec.train.recompute == "layer"
        return call.work.total_flops / (_RECOMPUTED if again else 1.0)

    def utilisation(self, call: CallForecast) -> float:
        """Model FLOPs utilisation of a call."""
        return self.model_flops(call) / max(1e-12, call.timed.seconds) / self.rate_of(call)


def make_outlook(
    config: Config,
    plan: RolePlan,
    machine: Machine,
    lengths: Lengths,
    price: float | None = None,
) -> Outlook:
    """The outlook of a plan that was made for the machine's ranks; seconds only if it fits."""
    size, node = machine.num_ranks, machine.devices_per_node
    fits = all(own.plan.fits for own in plan.memory.values())
    return Outlook(
        config=config,
        plan=plan,
        machine=machine,
        lengths=lengths,
        forecast=forecast_step(config, plan, machine, lengths) if fits else None,
        host=host_memory(config, plan, size, node),
        price=price,
    )


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Figures of a whole step.

    Args:
        tokens_per_second: tokens per second and device.
        utilisation: model FLOPs utilisation over all devices and seconds of the step.
        idle_share: mean share of the step in which a device waits for others.
        joules: energy of devices and hosts.
        cost: in the price's currency; None without a price.
    """

    tokens_per_second: float
    utilisation: float
    idle_share: float
    joules: float
    cost: float | None


def step_cost(outlook: Outlook) -> StepCost | None:
    """Figures of the step; None if it does not fit."""
    forecast, machine = outlook.forecast, outlook.machine
    if forecast is None:
        return None
    ranks, seconds = machine.num_ranks, max(1e-12, forecast.seconds)
    idle = sum(forecast.idle_share.values()) + (ranks - len(forecast.idle_share))
    idle /= ranks
    peak = machine.device.flops["bfloat16"]
    needed = sum(
        outlook.model_flops(call) * len(call.ranks) * peak / outlook.rate_of(call)
        for call in forecast.calls
        if call.role in outlook.plan.specs
    )
    device_watts = machine.device.watts * (1 - idle + IDLE_POWER * idle)
    watts = device_watts * ranks + machine.host_watts * machine.num_nodes
    return StepCost(
        tokens_per_second=forecast.tokens / seconds / ranks,
        utilisation=needed / (ranks * peak * seconds),
        idle_share=idle,
        joules=watts * seconds,
        cost=None if outlook.price is None else outlook.price * ranks * seconds / 3600,
    )


def as_json(outlook: Outlook) -> dict[str, Any]:
    """The outlook as plain values."""
    forecast, cost = outlook.forecast, step_cost(outlook)
    machine, capacity = outlook.machine, outlook.capacity
    found: dict[str, Any] = {
        "fits": outlook.fits,
        "gpu": machine.device.name,
        "nodes": machine.num_nodes,
        "gpus_per_node": machine.devices_per_node,
        "seconds_per_step": None if forecast is None else forecast.seconds,
        "tokens_per_second_per_gpu": None if cost is None else cost.tokens_per_second,
        "peak_gb": outlook.peak_bytes / GB,
        "capacity_gb": None if capacity is None else capacity / GB,
        "taken_gb": {name: size / GB for name, size in outlook.taken_bytes.items()},
        "host_gb_per_node": outlook.host.total / GB,
        "host_capacity_gb_per_node": machine.host_bytes / GB,
        "tokens_per_step": None if forecast is None else forecast.tokens,
        "mfu": None if cost is None else cost.utilisation,
        "idle_share": None if cost is None else cost.idle_share,
        "lag_saves_seconds": None if forecast is None else forecast.lag_saves,
        "joules_per_step": None if cost is None else cost.joules,
        "cost_per_step": None if cost is None else cost.cost,
        "memory": _memory_json(outlook.plan),
        "phases": {} if forecast is None else _phases_json(outlook, forecast),
    }
    return found


def _memory_json(plan: RolePlan) -> list[dict[str, Any]]:
    """Parts and calls of every distinct plan, with the ranks that have it."""
    known: dict[int, dict[str, Any]] = {}
    found: list[dict[str, Any]] = []
    for rank, memory in plan.memory.items():
        if id(memory) not in known:
            values = _plan_json(memory.plan)
            same = (own for own in found if {**own, "ranks": []} == values)
            known[id(memory)] = next(same, values)
            if known[id(memory)] is values:
                found.append(values)
        known[id(memory)]["ranks"].append(rank)
    return found


def _plan_json(plan: MemoryPlan) -> dict[str, Any]:
    sizes = {part.key: part.num_bytes for part in plan.parts}
    parts = {
        dotted(part.key): {
            "gb": part.num_bytes / GB,
            "host_gb": part.on_host / GB,
            "residency": "stays on the host" if part.on_host else plan.residencies[part.key],
        }
        for part in plan.parts
    }
    calls = {
        call.name: {
            "peak_gb": call.peak_bytes / GB,
            "working_gb": (call.peak_bytes - sum(sizes[key] for key in call.resident)) / GB,
            "in_gb": call.bytes_in / GB,
            "out_gb": call.bytes_out / GB,
        }
        for call in plan.calls
    }
    return {"ranks": [], "fits": plan.fits, "parts": parts, "calls": calls}


def _phases_json(outlook: Outlook, forecast: StepForecast) -> dict[str, Any]:
    phases: dict[str, Any] = {
        name: {"seconds": seconds, "calls": []} for name, seconds in forecast.phase_seconds.items()
    }
    for call in forecast.calls:
        phases.setdefault(call.phase, {"seconds": 0.0, "calls": []})["calls"].append(
            {
                "role": call.role,
                "call": call.call,
                "ranks": len(call.ranks),
                "seconds": call.timed.seconds,
                "bound": call.timed.bound,
                "bound_seconds": dict(call.timed.parts),
                "flops": call.work.total_flops,
                "memory_bytes": call.work.memory_bytes,
                "link_bytes": _plain(call.work.link_bytes),
                "mfu": outlook.utilisation(call) if call.role in outlook.plan.specs else None,
            }
        )
    return phases


def _plain(values: Mapping[Any, float]) -> dict[str, float]:
    return {str(key): value for key, value in values.items()}
