"""`Ledger`: keeps the results of role calls, so that a run can stop within a step and resume there.

It keeps the results of the calls that a step has finished, on their home ranks, with their inputs'
`Origin`. A resumed run repeats the step: calls that were finished return their kept results, and
the one that was stopped continues from its partial state, if the name and the origin are the same;
otherwise they are computed again. `together` finds the ledger in the context (`keeping`), so that
roles, flows and users' code need not pass it on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.reduce import world_sum
from spmdrl.observe.own_work import OwnWork, Waits
from spmdrl.roles.kept import Journal, Kept, Origin, PartialResult, Record
from spmdrl.supervision.pulse import Pulse, Stage
from spmdrl.world import World

if TYPE_CHECKING:
    # documented as torch.distributed.Store, but torch's stubs do not re-export it
    from torch._C._distributed_c10d import Store

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Takes the progress of work: (rows done, rows) of this rank."""

_REPORT: ContextVar[Report] = ContextVar("report", default=lambda done, count: None)

_KEPT_MEETINGS = 64
"""Number of meetings whose keys stay in the store; no rank lags this many role calls behind."""


class Diverged(RuntimeError):
    """Ranks make different role calls: the first to notice raises, before it could hang."""


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """Result of a call's `compute` that stopped before its end."""

    part: PartialResult


@dataclass(frozen=True, kw_only=True)
class Stint:
    """Controls that a call's `compute` is given.

    Args:
        should_stop: whether a stop was asked for, as this rank sees it: ranks that compute together
            agree before they act on it. A call that cannot stop need not ask.
        beat: to be called on progress.
        report: to be called on progress with (rows done, rows) of this rank's part; by default
            what `reporting` was given.
        begun: partial result of an earlier stint of the call.
    """

    should_stop: Callable[[], bool] = lambda: False
    beat: Callable[[], None] = lambda: None
    report: Report = field(default_factory=lambda: _REPORT.get())
    begun: PartialResult | None = None


class Ledger:
    """One rank's ledger.

    Args:
        prefix: prefix of its keys in the store, unique for the run.
        pulse: told of every call and its stages.
        should_stop: whether this rank knows of a request to stop.
        journal: journal of the step that the run resumes.
        roles: description of each role, equal for roles whose results may replace each other's.
        work: meter of the calls' computations.
    """

    def __init__(
        self,
        world: World,
        prefix: str,
        pulse: Pulse,
        should_stop: Callable[[], bool] = lambda: False,
        journal: Journal | None = None,
        roles: Mapping[str, str] | None = None,
        work: OwnWork | None = None,
    ) -> None:
        journal = Journal() if journal is None else journal
        self._roles = {} if roles is None else roles
        self.work = OwnWork(Waits()) if work is None else work
        self._rank, self._size, self._is_first = world.rank, world.size, world.is_first
        self._store: Store = world.connect(f"{prefix}/calls")
        self._pulse, self._should_stop = pulse, should_stop
        self._kept: list[Kept] = []
        self._unclaimed = list(journal.calls)
        """Calls kept by an earlier start and not asked for yet."""
        self._late: list[str] = []
        """Calls that are repeated in a step whose updates had begun."""
        self._history = b""
        self._meetings = 0
        self._step = -1

    # Steps

    def begin_step(self, step: int) -> None:
        """Forget the calls of earlier steps, except those that were made ahead for this one."""
        self._step = step
        self._kept = [
            kept
            for kept in self._kept
            if kept.step == step or (kept.step == step - 1 and kept.is_ahead)
        ]

    def finish_step(self) -> None:
        """End the step: keep only calls that were made ahead for the next step. Calls of an earlier
        start that were never asked for are dropped with a warning.
        """
        self._kept = [kept for kept in self._kept if kept.step == self._step and kept.is_ahead]
        if self._unclaimed and self._is_first:  # all ranks have the same
            names = ", ".join(dict.fromkeys(kept.name for kept in self._unclaimed))
            late = ", ".join(dict.fromkeys(self._late))
            log.warning(
                "what was kept from before the stop was made from other data or settings, or is "
                "not asked for any more, and was not used: %s%s",
                names,
                f"; made anew with weights that updates of the step had changed: {late}"
                if late
                else "",
            )
        self._unclaimed, self._late = [], []

    def journal(self) -> Journal:
        """The calls that are kept now."""
        return Journal(calls=(*self._kept, *self._unclaimed))

    @property
    def num_done(self) -> int:
        """Number of the step's finished calls."""
        calls = (*self._kept, *self._unclaimed)
        return sum(kept.step == self._step and kept.record is not None for kept in calls)

    # Calls

    def settings_of(self, role: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A call's settings with the description of its role."""
        return {**settings, "role": self._roles.get(role, role)}

    def open(
        self, name: str, origin: Origin, *, writes: bool = False, is_ahead: bool = False
    ) -> Kept:
        """Open the entry of the step's next call: the result that an earlier start has kept of it,
        or one to be recorded, with the partial result of an earlier start if there is one.

        Args:
            name: `role.method`, or the call's label.
            origin: origin of this rank's rows.
            writes, is_ahead: see `Kept`.
        """
        entry = Kept(name=name, step=self._step, origin=origin, writes=writes, is_ahead=is_ahead)
        found = [kept for kept in self._unclaimed if kept.name == name]
        if not found:
            return self._late_if_new(entry)
        self._meet(f"what is kept of {name}")
        wanted = origin.of_world(world_sum(torch.tensor(origin.sums, dtype=torch.float64)).tolist())
        kept = next((kept for kept in found if kept.origin.agrees(wanted)), None)
        if kept is None:
            return self._late_if_new(entry)
        self._unclaimed.remove(kept)
        return replace(entry, part=kept.part) if kept.record is None else kept

    def _late_if_new(self, entry: Kept) -> Kept:
        if any(kept.writes and kept.name != entry.name for kept in self._unclaimed):
            self._late.append(entry.name)
        return entry

    def enter(self, name: str, shapes: str) -> None:
        """Enter a group of calls. Every rank must enter the same groups in the same order.

        Args:
            name: names (`role.method`) of all calls of a `together`.
            shapes: their columns; equal on all ranks.

        Raises:
            Diverged: another rank has entered other calls, now or earlier.
        """
        self._pulse.at_call(name, "sending")
        self._meet(f"{name}({shapes})")

    def stage(self, stage: Stage) -> None:
        self._pulse.at_call(self._pulse.position.call, stage)

    def stint(self, entry: Kept | None) -> Stint:
        """The controls for the call's `compute`. A call without an entry never stops."""
        if entry is None:
            return Stint(beat=self._pulse.beat)
        return Stint(should_stop=self._should_stop, beat=self._pulse.beat, begun=entry.part)

    def agree(
        self, entries: Sequence[Kept | None], stopped: Sequence[bool]
    ) -> tuple[list[Kept | None], list[bool], bool]:
        """Agree over the world on the origins of the entries, on the calls that were stopped on
        some rank, and on whether the flow must stop here.

        Args:
            entries: one for each call, None for a call of which nothing is kept.
        """
        opened = [entry for entry in entries if entry is not None]
        if not opened:
            return list(entries), [False] * len(entries), False
        sums = [number for entry in opened for number in entry.origin.sums]
        flags = [float(flag) for flag in (*stopped, self._should_stop())]
        totals = world_sum(torch.tensor([*flags, *sums], dtype=torch.float64)).tolist()
        *any_stopped, stop = [total > 0 for total in totals[: len(flags)]]
        numbers, whole = iter(totals[len(flags) :]), []
        for entry in opened:
            own = [next(numbers) for _ in entry.origin.sums]
            whole.append(replace(entry, origin=entry.origin.of_world(own)))
        agreed = iter(whole)
        found = [None if entry is None else next(agreed) for entry in entries]
        return found, any_stopped, stop or any(any_stopped)

    def record(self, entry: Kept | None, record: Record) -> None:
        """Keep the result of a finished call.

        Args:
            entry: entry that `agree` returned; None keeps nothing.
        """
        if entry is not None:
            self._kept.append(replace(entry, record=record, part=None))

    def suspend(self, entry: Kept | None, part: PartialResult | None) -> None:
        """Keep the partial result of a stopped call; None if this rank has none."""
        if entry is not None:
            self._kept.append(replace(entry, part=PartialResult() if part is None else part))

    def recall(self, kept: Kept, places: Tensor | None) -> Record:
        """Take over the result of a finished call that an earlier start has kept.

        Args:
            places: places of the home rows.

        Raises:
            ValueError: other ranks have kept its rows, and they cannot be identified.
        """
        assert kept.record is not None
        record = kept.record
        if record.rows is not None and kept.is_foreign:
            if places is None or record.places is None:
                raise ValueError(
                    f"{kept.name} was finished on another number of ranks, and its rows have no "
                    "atoms by which they find home: resume on as many ranks as before"
                )
            index = {tuple(place): row for row, place in enumerate(record.places.tolist())}
            rows = record.rows.select([index[tuple(place)] for place in places.tolist()])
            record = Record(rows=rows, places=places)
        self._kept.append(replace(kept, record=record, is_foreign=False))
        return record

    def keep_rows(
        self, name: str, origin: Origin, places: Tensor, make: Callable[[], Batch]
    ) -> Batch:
        """Return home rows that `make` creates without a role call, or the kept ones. Every rank of
        the world calls it.

        Args:
            name, origin: see `open`.
            places: places of the rows.
        """
        entry = self.open(name, origin)
        if entry.record is not None:
            recalled = self.recall(entry, places).rows
            assert recalled is not None, name
            return recalled
        rows = make()
        whole = origin.of_world(world_sum(torch.tensor(origin.sums, dtype=torch.float64)).tolist())
        self.record(replace(entry, origin=whole), Record(rows=rows, places=places))
        return rows

    def _meet(self, what: str) -> None:
        """Compare the ranks' histories through the store: the first to come writes, others read."""
        if self._size == 1:
            return
        self._history = blake2b(self._history + what.encode(), digest_size=8).digest()
        here = f"rank {self._rank}, step {self._pulse.position.step}: {what}"
        mine = f"{self._history.hex()} {here}"
        key = f"{self._meetings}"
        found = self._store.compare_set(key, "", mine).decode()
        theirs, _, there = found.partition(" ")
        if theirs != self._history.hex():
            raise Diverged(
                f"role call {self._meetings + 1} of the run is not the same on all ranks. {there}; "
                f"{here}. A flow must make the same calls on every rank, with columns of the same "
                "kind: look for a branch on a value that differs between ranks"
            )
        if self._is_first and self._meetings >= _KEPT_MEETINGS:
            self._store.delete_key(f"{self._meetings - _KEPT_MEETINGS}")
        self._meetings += 1


def places_of(atom: Tensor | None) -> Tensor | None:  # [B] int64
    """(atom, number of its rows before this one) of every row, `[B, 2]`: equal in any layout."""
    if atom is None:
        return None
    seen: dict[int, int] = {}
    places = []
    for value in atom.tolist():
        seen[value] = seen.get(value, -1) + 1
        places.append((value, seen[value]))
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 2)


_CURRENT: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def keeping(ledger: Ledger) -> Iterator[None]:
    """Enter role calls inside the block into the ledger."""
    token = _CURRENT.set(ledger)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Ledger | None:
    """The ledger of the current run, if there is one."""
    return _CURRENT.get()


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Pass the progress of role calls and reward functions inside the block to `report`."""
    token = _REPORT.set(report)
    try:
        yield
    finally:
        _REPORT.reset(token)
