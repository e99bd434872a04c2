"""The memory plans of all ranks as texts, for `explain` and the start of a run."""

from __future__ import annotations

from collections.abc import Mapping

from spmdrl.distributed.mesh import format_ranks
from spmdrl.memory.parts import Part, size_text
from spmdrl.planning.memory import RankMemory


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
