"""Times of a step's calls on ranks that they share or do not: stages, idle ranks.

Every rank makes the calls of its roles in the flow's order, and a call begins when all ranks of
its role are free. Between stages rows come home, so that every rank waits for all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spmdrl.planning.forecast.step import CallForecast


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Seconds of a step.

    Args:
        phases: seconds by phase, in order.
        busy: seconds in which a rank computes for one of its roles.
    """

    phases: Mapping[str, float]
    busy: Mapping[int, float]

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def run_calls(stages: Sequence[Sequence[CallForecast]], ranks: Iterable[int]) -> Timeline:
    """Run the stages one after another; the calls of a stage have one phase."""
    cells: dict[frozenset[int], list[int]] = {}
    numbered = [call for stage in stages for call in stage]
    members = [frozenset(call.ranks) for call in numbered]
    for rank in ranks:
        own = frozenset(i for i, within in enumerate(members) if rank in within)
        cells.setdefault(own, []).append(rank)
    busy = dict.fromkeys(cells, 0.0)
    phases: dict[str, float] = {}
    first = 0
    for stage in stages:
        ready = dict.fromkeys(cells, 0.0)
        for number, call in enumerate(stage, start=first):
            own_cells = [cell for cell in cells if number in cell]
            end = max((ready[cell] for cell in own_cells), default=0.0) + call.timed.seconds
            for cell in own_cells:
                ready[cell] = end
                busy[cell] += call.timed.seconds
        first += len(stage)
        if stage:
            phase = stage[0].phase
            phases[phase] = phases.get(phase, 0.0) + max(ready.values(), default=0.0)
    by_rank = {rank: busy[cell] for cell, own in cells.items() for rank in own}
    return Timeline(phases=phases, busy=by_rank)
