"""`Turns`: what a role call does with the memory of its rank before it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spmdrl.memory.parts import PartName
from spmdrl.memory.plan import MemoryPlan
from spmdrl.memory.residency import Residency


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What the plan says of a rank's calls, by call (`policy.update`).

    Args:
        residency: of this rank.
        working_bytes: what it has on the device beside parts.
        prefetches: what can start to come for the call after it; the room for it is reserved.
    """

    residency: Residency
    working_bytes: Mapping[str, int] = field(default_factory=dict)
    prefetches: Mapping[str, tuple[PartName, ...]] = field(default_factory=dict)

    def begin(
        self,
        call: str,
        uses: Sequence[PartName],
        *,
        fills: Sequence[PartName] = (),
        is_planned: bool = True,
    ) -> None:
        """Bring what `call` uses, and start to bring what the plan's next call uses.

        In a step of other calls than the planned ones that may be in vain, and where parts are held
        (`Residency.resident`) the room may be taken: then nothing is started.

        Args:
            fills: parts whose whole content the call writes.
            is_planned: False: the call is a check between those of the plan, whatever its name.
                Where there is room, what they have and what is coming for them stays.
        """
        working = self.working_bytes.get(call, 0)
        if not is_planned:
            fits = self.residency.has_room((*uses, *fills), working)
            self.residency.prepare(uses, fills=fills, alone=not fits)
            return
        self.residency.prepare(uses, fills=fills)
        if ahead := self.prefetches.get(call):
            self.residency.prefetch(ahead, working_bytes=working)


def planned_turns(
    residency: Residency, plan: MemoryPlan, working_bytes: Mapping[str, int]
) -> Turns:
    """The turns of a plan, whose schedule is printed."""
    prefetches = {call.name: call.prefetch for call in plan.calls}
    return Turns(residency=residency, working_bytes=working_bytes, prefetches=prefetches)
