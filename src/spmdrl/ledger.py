"""`Ledger`: what a run keeps of its role calls, so that it can stop in a step and go on from there.

Results of the calls that a step has finished are kept, on their home ranks, under (step, number of
the call). A run that goes on from a stop does the step anew: calls that were finished return what
is kept of them, and the one that was stopped goes on from where it came to. `together` looks the
ledger up in the context (`keeping`), so that roles, flows and what users write need not carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.reduce import world_flags
from spmdrl.launch import World
from spmdrl.runtime.pulse import Pulse, Stage

if TYPE_CHECKING:
    # documented as torch.distributed.Store, but torch's stubs do not re-export it
    from torch._C._distributed_c10d import Store

_KEPT_MEETINGS = 64
"""Meetings whose keys stay in the store; no rank is so many role calls behind another."""


class Diverged(RuntimeError):
    """Ranks make different role calls: the first to notice raises, before it could hang."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """What came home of a finished call.

    Args:
        step: in which it ran.
        rows: home rows; None where the result is `values`.
        places: (atom, place within the atom) of every row, `[B, 2]`; None without atoms.
        values: JSON values, equal on all ranks.
    """

    step: int
    rows: Batch | None = None
    places: Tensor | None = None
    values: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What a call that was stopped has left on one rank.

    Args:
        rows: of its results, in the role's layout.
        values: JSON values, equal on all of the role's ranks.
        state: what this rank alone can go on from, in the same layout.
    """

    rows: Batch | None = None
    values: Any = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """What a call's `compute` returns in place of its result where it stopped before its end."""

    part: Part


@dataclass(frozen=True, kw_only=True)
class Stint:
    """What a call's `compute` is given.

    Args:
        should_stop: whether a stop was asked for. What this rank sees: ranks that compute together
            agree before they act on it. A call that cannot stop need not ask.
        beat: to be called when it came further.
        report: the same, with (rows done, rows) of this rank's part.
        begun: what an earlier stint of the call has left.
    """

    should_stop: Callable[[], bool] = lambda: False
    beat: Callable[[], None] = lambda: None
    report: Callable[[int, int], None] = lambda done, count: None
    begun: Part | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A call's place in the ledger; `key` is None where nothing is kept."""

    key: str | None = None
    record: Record | None = None


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What a stop saves of the calls, and a resumed run begins with. By the calls' keys.

    Args:
        is_foreign: it comes from other ranks: rows are those of the whole world then, and go to
            their new homes by their places.
    """

    records: Mapping[str, Record] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    is_foreign: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.records or self.parts)


class Ledger:
    """One rank's.

    Args:
        prefix: of its keys in the store: unique for the run.
        pulse: told of every call and its stages.
        should_stop: whether this rank knows of a request to stop.
        journal: of the step that the run goes on in.
        report: told how far a call is, see `Stint`.
    """

    def __init__(
        self,
        world: World,
        prefix: str,
        pulse: Pulse,
        should_stop: Callable[[], bool] = lambda: False,
        journal: Journal | None = None,
        report: Callable[[int, int], None] = lambda done, count: None,
    ) -> None:
        journal = Journal() if journal is None else journal
        self._report = report
        self._rank, self._size, self._is_first = world.rank, world.size, world.is_first
        self._store: Store = world.connect(f"{prefix}/calls")
        self._pulse, self._should_stop = pulse, should_stop
        self._records, self._parts = dict(journal.records), dict(journal.parts)
        self._foreign = set(journal.records) if journal.is_foreign else set()
        self._history = b""
        self._meetings = self._calls = 0
        self._step = -1

    # Steps

    def begin_step(self, step: int) -> None:
        """Forget the calls of earlier steps, but for labelled ones of the step before this one."""
        self._step, self._calls = step, 0
        self._records = {
            key: record
            for key, record in self._records.items()
            if record.step == step or (record.step == step - 1 and _is_label(key))
        }

    def finish_step(self) -> None:
        """The step is done: of what it has kept, the next one looks up labelled calls alone."""
        self._records = {
            key: record
            for key, record in self._records.items()
            if record.step == self._step and _is_label(key)
        }

    def journal(self) -> Journal:
        """What is kept now."""
        return Journal(records=dict(self._records), parts=dict(self._parts))

    @property
    def num_done(self) -> int:
        """Calls of the step that are finished."""
        return sum(record.step == self._step for record in self._records.values())

    # Calls

    def open(self, label: str | None, *, kept: bool) -> Entry:
        """The place of the step's next call (or of the labelled one); with what is kept of it."""
        if not kept:
            return Entry()
        key = f"label {label}"
        if label is None:
            key = f"{self._step}/{self._calls}"
            self._calls += 1
        return Entry(key=key, record=self._records.get(key))

    def enter(self, name: str, shapes: str) -> None:
        """Calls begin; all ranks of the world shall come to this place in one order.

        Args:
            name: `role.method`, of all calls of a `together`.
            shapes: their columns; equal on all ranks.

        Raises:
            Diverged: another rank came to another call, or by another way.
        """
        self._pulse.at_call(name, "sending")
        self._meet(f"{name}({shapes})")

    def stage(self, stage: Stage) -> None:
        self._pulse.at_call(self._pulse.position.call, stage)

    def stint(self, entry: Entry) -> Stint:
        """What the call's `compute` is given. A call of which nothing is kept never stops."""
        if entry.key is None:
            return Stint(beat=self._pulse.beat, report=self._report)
        return Stint(
            should_stop=self._should_stop,
            beat=self._pulse.beat,
            report=self._report,
            begun=self._parts.get(entry.key),
        )

    def agree(self, entries: Sequence[Entry], stopped: Sequence[bool]) -> tuple[list[bool], bool]:
        """Which of the calls were stopped on some rank, and whether the flow shall stop here."""
        if all(entry.key is None for entry in entries):
            return [False] * len(entries), False
        *any_stopped, stop = world_flags(*stopped, self._should_stop())
        return any_stopped, stop or any(any_stopped)

    def record(
        self,
        entry: Entry,
        *,
        rows: Batch | None = None,
        places: Tensor | None = None,
        values: Any = None,
    ) -> None:
        """A call is finished."""
        if entry.key is not None:
            self._parts.pop(entry.key, None)
            self._records[entry.key] = Record(
                step=self._step, rows=rows, places=places, values=values
            )

    def suspend(self, entry: Entry, part: Part | None) -> None:
        """A call was stopped; None where this rank has no part in it."""
        assert entry.key is not None
        self._parts.pop(entry.key, None)
        if part is not None:
            self._parts[entry.key] = part

    def home_rows(self, entry: Entry, places: Tensor | None) -> Batch:
        """The rows of a finished call, for home rows at these places.

        Raises:
            ValueError: the rows were kept by other ranks, and cannot be told apart.
        """
        assert entry.record is not None and entry.record.rows is not None
        record, rows = entry.record, entry.record.rows
        if entry.key not in self._foreign:
            return rows
        if places is None or record.places is None:
            raise ValueError(
                f"call {entry.key} of the step was finished on another number of ranks, and its "
                "rows have no atoms by which they find home: go on with as many ranks as before"
            )
        index = {tuple(place): row for row, place in enumerate(record.places.tolist())}
        return rows.select([index[tuple(place)] for place in places.tolist()])

    def keep_rows(self, places: Tensor, make: Callable[[], Batch]) -> Batch:
        """Home rows that are made without a role call, or what is kept of them."""
        entry = self.open(None, kept=True)
        if entry.record is not None:
            return self.home_rows(entry, places)
        rows = make()
        self.record(entry, rows=rows, places=places)
        return rows

    def _meet(self, what: str) -> None:
        """Compare notes through the store: who comes first leaves them, the others read."""
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


def _is_label(key: str) -> bool:
    return key.startswith("label ")


def places_of(atom: Tensor | None) -> Tensor | None:  # [B] int64
    """(atom, how many of its rows come before) of every row, `[B, 2]`: the same wherever it is."""
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
    """Role calls inside are entered into the ledger."""
    token = _CURRENT.set(ledger)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Ledger | None:
    """The ledger of the run that goes on, if there is one."""
    return _CURRENT.get()
