"""`check_engine`: holds a rollout engine to the clauses that every engine keeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from spmdrl.testing.clause import Clause, Findings, Report, check_clauses
from spmdrl.testing.engine_draws import DRAWS
from spmdrl.testing.engine_ends import ENDS
from spmdrl.testing.engine_subject import EngineCandidate, EngineFeature, EngineSubject
from spmdrl.testing.engine_turns import TURNS
from spmdrl.testing.engine_weights import WEIGHTS, ranks_outside_take_no_part
from spmdrl.world import World


def _clause(
    check: Callable[[EngineSubject], Findings],
    needs: EngineFeature | None = None,
    least_ranks: int = 1,
) -> Clause[EngineSubject]:
    name = check.__name__.replace("_", " ")
    return Clause(name=name, check=check, needs=needs, least_ranks=least_ranks)


ENGINE_CLAUSES: tuple[Clause[EngineSubject], ...] = (
    *(_clause(check) for check in (*DRAWS, *ENDS, *WEIGHTS)),
    *(_clause(check, "turns") for check in TURNS),
    _clause(ranks_outside_take_no_part, "ranks_of_its_own", 2),
)


def check_engine(
    candidate: EngineCandidate,
    world: World,
    *,
    only: Collection[str] = (),
    clauses: Sequence[Clause[EngineSubject]] = ENGINE_CLAUSES,
    told: Callable[[str], None] | None = None,
) -> Report:
    """Hold an engine to the contract. Every rank of the world calls it, in a process group that
    runs; its ranks are the engine's one tensor-parallel group.

    Args:
        only: names of clauses; empty: all.
        clauses: those that there are.
        told: callback with each clause's name before it is tried.

    Raises:
        ValueError: a name is no clause's.
    """
    unknown = sorted(set(only) - {clause.name for clause in clauses})
    if unknown:
        known = ", ".join(clause.name for clause in clauses)
        raise ValueError(f"there is no clause {unknown[0]!r}: there are {known}")
    chosen = [clause for clause in clauses if not only or clause.name in only]
    subject = EngineSubject(candidate, world)
    try:
        return Report(verdicts=tuple(check_clauses(chosen, subject, told=told)))
    finally:
        subject.close()
