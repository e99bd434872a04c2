"""`CallMemory`: the moves of memory that precede each role call of a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.parts import PartKey
from spmdrl.memory.plan import MemoryPlan


@dataclass(frozen=True, kw_only=True)
class CallMemory:
    """The plan's data for a rank's calls, by call (`policy.update`).

    Args:
        parts: this rank's parts.
        working_bytes: bytes of each call on the device in addition to parts.
        prefetches: parts that can start to come for the next call; the plan reserves their room.
        splits: the roles whose optimizer is on the device only while it steps.
    """

    parts: DeviceParts
    working_bytes: Mapping[str, int] = field(default_factory=dict)
    prefetches: Mapping[str, tuple[PartKey, ...]] = field(default_factory=dict)
    splits: frozenset[str] = frozenset()

    def begin(
        self,
        call: str,
        uses: Sequence[PartKey],
        *,
        fills: Sequence[PartKey] = (),
        is_planned: bool = True,
        is_last: bool = True,
    ) -> None:
        """Bring the parts that `call` uses, and start bringing those of the plan's next call.

        If a step's calls are not the planned ones, this prefetch may be in vain. If parts are held
        (`DeviceParts.resident`), their room may be taken; then nothing is started.

        Args:
            fills: parts whose whole content the call writes.
            is_planned: if False, the call is a check between the calls of the plan, whatever its
                name; if there is room, the parts that those calls have or await stay.
            is_last: if False, the same role goes on: nothing comes for the plan's next call.
        """
        working = self.working_bytes.get(call, 0)
        if not is_planned:
            fits = self.parts.has_room((*uses, *fills), working)
            self.parts.prepare(uses, fills=fills, exclusive=not fits)
            return
        self.parts.prepare(uses, fills=fills)
        ahead = self.prefetches.get(call)
        if ahead and is_last:
            self.parts.prefetch(ahead, working_bytes=working)


def planned_call_memory(
    parts: DeviceParts,
    plan: MemoryPlan,
    working_bytes: Mapping[str, int],
    splits: frozenset[str] = frozenset(),
) -> CallMemory:
    """The call memory of a plan, with its prefetches by call (of several, the last one's)."""
    prefetches = {call.name: call.prefetch for call in plan.calls}
    return CallMemory(
        parts=parts, working_bytes=working_bytes, prefetches=prefetches, splits=splits
    )
