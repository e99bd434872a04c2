"""The contract of train backends: what each of them does, whatever system is behind it.

A `Candidate` says how to choose the backend, on which layouts it is tried, and what it lacks.
`check_backend` holds it to the clauses on all ranks of the process group that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from spmdrl.distributed.groups import ProcessGroups
from spmdrl.testing.clause import Clause, Report, Verdict, check_clauses
from spmdrl.testing.clauses.gradients import float32_sums, global_normaliser, gradient_sums
from spmdrl.testing.clauses.held import groups, layout, parts
from spmdrl.testing.clauses.roles import (
    adapters,
    freezing,
    frozen_roles,
    neighbours,
    outside,
    readouts,
    refusals,
    shared_bases,
)
from spmdrl.testing.clauses.steps import experts, no_signal, non_finite, resume, steps
from spmdrl.testing.subject import Candidate, Layout, Subject
from spmdrl.world import World

CLAUSES = (
    # before any that would hang
    Clause(name="no group of the whole world", check=groups, least_ranks=2),
    Clause(name="readouts", check=readouts),
    Clause(name="gradient sums", check=gradient_sums),
    Clause(name="float32 sums", check=float32_sums, needs="bfloat16"),
    Clause(name="global normaliser", check=global_normaliser),
    Clause(name="steps", check=steps),
    Clause(name="minibatches without signal", check=no_signal),
    Clause(name="gradients that are not finite", check=non_finite),
    Clause(name="exact resume", check=resume),
    Clause(name="layout", check=layout),
    Clause(name="parts that leave", check=parts),
    Clause(name="freezing", check=freezing, needs="freeze"),
    Clause(name="frozen roles", check=frozen_roles, needs="frozen_roles"),
    Clause(name="adapters", check=adapters, needs="adapters"),
    Clause(name="shared bases", check=shared_bases, needs="shared_bases"),
    Clause(name="experts", check=experts, needs="experts"),
    Clause(name="two roles", check=neighbours),
    Clause(name="ranks outside", check=outside, least_ranks=2),
    Clause(name="refusals", check=refusals),
)


def check_backend(
    candidate: Candidate,
    world: World,
    *,
    only: Collection[str] = (),
    layouts: Collection[Layout] = (),
    told: Callable[[str], None] | None = None,
) -> Report:
    """Hold a candidate to the contract on its layouts of this many ranks; all ranks call it.

    Args:
        only: names of clauses; empty: all.
        layouts: layouts to try; empty: the candidate's.
        told: callback with each clause's name before it is tried.

    Raises:
        ValueError: a clause is unknown, or the candidate has no layout of this many ranks.
    """
    unknown = sorted(set(only) - {clause.name for clause in CLAUSES})
    if unknown:
        known = ", ".join(clause.name for clause in CLAUSES)
        raise ValueError(f"there is no clause {unknown[0]!r}: there are {known}")
    tried = layouts or candidate.layouts.get(world.size, ())
    if not tried:
        raise ValueError(
            f"{candidate.name} has no layout of {world.size} ranks: it has layouts of "
            f"{sorted(candidate.layouts)}"
        )
    chosen = [clause for clause in CLAUSES if not only or clause.name in only]
    made = ProcessGroups()
    verdicts: list[Verdict] = []
    for tried_layout in tried:
        subject = Subject(candidate, world, tried_layout, made)
        verdicts += check_clauses(chosen, subject, told=told)
    return Report(verdicts=tuple(verdicts))
