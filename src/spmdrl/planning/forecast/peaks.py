"""Bytes that a memory plan has in a step, by phase of a run's metrics."""

from __future__ import annotations

from spmdrl.config.sections import Config
from spmdrl.planning.forecast.flow_calls import flow_calls
from spmdrl.planning.plan import RolePlan
from spmdrl.roles.policy_sync import SYNC


def phase_bytes(config: Config, plan: RolePlan, *, with_working: bool) -> dict[str, int]:
    """The most bytes by phase, of the rank that has most.

    Args:
        with_working: parts with working memory; else parts only.
    """
    calls = flow_calls(config, plan.specs, lag=config.lag > 0)
    phases = {SYNC: "sync", **{call.name: call.phase for call in calls}}
    found: dict[str, int] = {}
    for memory in {id(own): own for own in plan.memory.values()}.values():
        sizes = {part.key: part.num_bytes for part in memory.plan.parts}
        for call in memory.plan.calls:
            if call.name not in phases:
                continue
            parts = sum(sizes[key] for key in call.resident)
            size = call.peak_bytes if with_working else parts
            phase = phases[call.name]
            found[phase] = max(found.get(phase, 0), size)
    return found


def peak_bytes(plan: RolePlan) -> int:
    """The most bytes of parts and working memory on any rank."""
    return max((memory.plan.peak_bytes for memory in plan.memory.values()), default=0)
