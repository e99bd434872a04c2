"""Work of moving parts between a device and its host, from the memory plan's schedule."""

from __future__ import annotations

from spmdrl.memory.schedule import ScheduledCall
from spmdrl.planning.forecast.work import NOTHING, Work
from spmdrl.planning.memory import RankMemory
from spmdrl.roles.model_calls import OPTIMIZER_STEP


def move_work(memory: RankMemory, call: str, *, num_steps: int = 1) -> Work:
    """Work of the moves before a call of a step, without those that an earlier call hides; of an
    update also those within it, if its optimizer comes for its steps only.

    Args:
        call: its name in the schedule, `policy.update`.
        num_steps: optimizer steps of an update.
    """
    scheduled = memory.plan.calls
    step = f"{call.removesuffix('update')}{OPTIMIZER_STEP}" if call.endswith(".update") else call
    moves = [
        _work(found, scheduled[i - 1])
        for i, found in enumerate(scheduled)
        if found.name in (call, step)
    ]
    return sum(moves, NOTHING) + _windowed(memory, call) * num_steps


def _windowed(memory: RankMemory, call: str) -> Work:
    """Work of an optimizer's state that passes through the device in one step; both directions
    count, as if they took turns: no card has measured how far they overlap.
    """
    role = call.removesuffix(".update")
    if call == role or role not in memory.windowed:
        return NOTHING
    return Work(link_bytes={"host": 2.0 * memory.windowed[role]})


def _work(call: ScheduledCall, before: ScheduledCall) -> Work:
    waited = max(0, call.bytes_in - before.prefetch_bytes) + call.bytes_out
    moved = len(call.moved_in) + len(call.moved_out)
    if not moved:
        return NOTHING
    return Work(link_bytes={"host": float(waited)}, messages={"host": float(moved)})
