"""Clauses of a contract, what they find, and reports of them.

A clause is a plain function of a subject that yields a `Finding` for each thing that does not
hold. It runs to its end on every rank, whatever it finds, since the other ranks wait in the
backend's collectives; then the ranks tell each other, and all of them have the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.models.local_shards import LocalTensors, local_box
from spmdrl.world import World

SHOWN = 3
"""Findings of a clause that its error shows."""


class ContractError(AssertionError):
    """A clause that does not hold, with what it expects and what was seen.

    Args:
        clause: the clause's name.
        subject: the backend and its layout.
        lines: one for each finding, with its rank.
    """

    def __init__(self, clause: str, subject: str, lines: Sequence[str]) -> None:
        super().__init__(clause, subject, tuple(lines))  # what a copy of it is made from
        self.clause, self.subject, self.lines = clause, subject, tuple(lines)

    def __str__(self) -> str:
        return f"{self.subject}: {self.clause!r} does not hold: {'; '.join(self.lines)}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as the contract says."""

    expected: str
    seen: str

    def __str__(self) -> str:
        return f"expected {self.expected}, seen {self.seen}"


Findings = Iterator[Finding]


class Held(Protocol):
    """A backend or an engine on the ranks of a world, which is held to clauses."""

    @property
    def world(self) -> World: ...

    def has(self, feature: str) -> bool:
        """Whether it has an ability that clauses may need."""

    def describe(self) -> str:
        """Name it, its ranks and its layout."""


S = TypeVar("S", bound=Held)


@dataclass(frozen=True, kw_only=True)
class Clause(Generic[S]):
    """A part of a contract.

    Args:
        name: its name in reports and errors.
        check: yields what does not hold.
        needs: the ability without which it does not apply.
        least_ranks: the number of ranks that it needs.
    """

    name: str
    check: Callable[[S], Findings]
    needs: str | None = None
    least_ranks: int = 1

    @property
    def about(self) -> str:
        """The first sentence of what it says."""
        return " ".join((self.check.__doc__ or "").split(".")[0].split())

    def reason_to_skip(self, subject: S) -> str | None:
        if self.needs is not None and not subject.has(self.needs):
            return f"it has no {self.needs.replace('_', ' ')}"
        if subject.world.size < self.least_ranks:
            return f"it needs {self.least_ranks} ranks"
        return None

    def hold(self, subject: S) -> None:
        """Hold a subject to the clause; every rank of the world calls it.

        Raises:
            ContractError: it does not hold, on all ranks alike.
        """
        try:
            found = [str(finding) for finding in self.check(subject)]
        except Exception as error:
            error.add_note(f"while {subject.describe()} was held to {self.name!r}")
            raise
        everyones: list[list[str]] = [[] for _ in range(subject.world.size)]
        dist.all_gather_object(everyones, found)
        lines = [f"rank {rank}: {line}" for rank, own in enumerate(everyones) for line in own]
        if lines:
            more = len(lines) - SHOWN
            shown = [*lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
            raise ContractError(self.name, subject.describe(), shown)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of a clause on a subject.

    Args:
        error: the reason why it does not hold, if it does not.
        skipped: the reason why it does not apply, if it does not.
    """

    subject: str
    clause: str
    error: ContractError | None = None
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The verdicts of a check, equal on all ranks."""

    verdicts: tuple[Verdict, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """The names of the clauses that do not hold, each once."""
        found = [verdict.clause for verdict in self.verdicts if verdict.error is not None]
        return tuple(dict.fromkeys(found))

    def require(self) -> Report:
        """Return the report.

        Raises:
            ContractError: that of the first clause that does not hold.
        """
        for verdict in self.verdicts:
            if verdict.error is not None:
                raise verdict.error
        return self

    def lines(self) -> Iterator[str]:
        """Yield a line for each verdict, under those of the subjects."""
        subject = ""
        for verdict in self.verdicts:
            if verdict.subject != subject:
                subject = verdict.subject
                yield subject
            if verdict.error is not None:
                yield f"  BROKEN  {verdict.error}"
            elif verdict.skipped is not None:
                yield f"  -       {verdict.clause}: {verdict.skipped}"
            else:
                yield f"  holds   {verdict.clause}"


def check_clauses(
    clauses: Sequence[Clause[S]],
    subject: S,
    *,
    told: Callable[[str], None] | None = None,
) -> Iterator[Verdict]:
    """Hold a subject to each clause in turn.

    Args:
        told: callback with each clause's name before it is tried: a backend that computes with
            freed storage ends the process.
    """
    where = subject.describe()
    for clause in clauses:
        skipped = clause.reason_to_skip(subject)
        if skipped is not None:
            yield Verdict(subject=where, clause=clause.name, skipped=skipped)
            continue
        if told is not None:
            told(clause.name)
        try:
            clause.hold(subject)
        except ContractError as error:
            yield Verdict(subject=where, clause=clause.name, error=error)
        else:
            yield Verdict(subject=where, clause=clause.name)


def same(what: str, seen: object, expected: object) -> Findings:
    """Find a value that is not equal to the expected one."""
    if seen != expected:
        yield Finding(expected=f"{what} {expected}", seen=str(seen))


def near(what: str, seen: float, expected: float, rel: float) -> Findings:
    """Find a number that differs from the expected one by more than `rel` of it."""
    if not abs(seen - expected) <= rel * abs(expected) + 1e-12:
        yield Finding(expected=f"{what} {expected:.7g} (to {rel:g})", seen=f"{seen:.7g}")


def near_sums(seen: Mapping[str, float], expected: Mapping[str, float], rel: float) -> Findings:
    """Find metrics that are missing or differ by more than `rel`."""
    yield from same("metrics", sorted(seen), sorted(expected))
    for name in sorted(seen.keys() & expected.keys()):
        yield from near(f"the metric {name!r}", seen[name], expected[name], rel)


def close(
    what: str,
    seen: Tensor,
    expected: Tensor,  # as `seen`
    *,
    rtol: float = 0.0,
    atol: float,
) -> Findings:
    """Find a tensor that differs in shape, or somewhere by more than the tolerance."""
    if seen.shape != expected.shape:
        yield Finding(expected=f"{what} of {tuple(expected.shape)}", seen=f"{tuple(seen.shape)}")
        return
    a, b = seen.detach().cpu().double(), expected.detach().cpu().double()
    excess = (a - b).abs() - (atol + rtol * b.abs())
    wrong = ~(excess <= 0)  # NaN too
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        yield Finding(
            expected=f"{what} {b[at]:.7g} at {at} (to {atol:g} and {rtol:g} of it)",
            seen=f"{a[at]:.7g}, and {int(wrong.sum())} of {wrong.numel()} differ",
        )


def unchanged(what: str, seen: LocalTensors, before: Mapping[str, Tensor]) -> Findings:
    """Find tensors that are not bit for bit what they were."""
    moved = [name for name, (tensor, _) in seen.items() if not torch.equal(tensor, before[name])]
    if moved:
        yield Finding(expected=f"{what} as before", seen=f"{moved[0]} and {len(moved) - 1} differ")


def slices_close(
    what: str,
    held: LocalTensors,
    whole: Mapping[str, Tensor],
    *,
    rtol: float = 0.0,
    atol: float,
) -> Findings:
    """Find local tensors whose slices differ from the boxes of whole tensors, the first of them.

    Args:
        whole: global tensors by name; slices of others are left out.
    """

    def all_of_them() -> Findings:
        for tensor, slices in held.values():
            for piece in slices:
                if piece.name not in whole:
                    continue
                ranges = zip(piece.start, piece.stop, strict=True)
                box = whole[piece.name][tuple(slice(a, b) for a, b in ranges)]
                named = f"{what} of {piece.name}{list(piece.start)}"
                yield from close(named, local_box(tensor, piece), box, rtol=rtol, atol=atol)

    yield from islice(all_of_them(), 1)
