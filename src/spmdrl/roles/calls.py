"""Role calls, and `together`.

A role is a handle that every rank holds: a mesh, and on the mesh's ranks a backend or an engine.
A role call takes home rows to the role's layout, computes on the member ranks, and brings the
results home. `role.method(batch)` runs it; `role.method.on(batch)` only describes it, for
`together`, which exchanges the rows of several calls first, lets each rank compute for the roles it
belongs to, and then brings all results home.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.exchange import bring_home, gather_rows, send_to_role
from spmdrl.distributed.exchange_plan import Exchange, ExchangePlan, RowTable, plan_exchanges
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.reduce import broadcast_object
from spmdrl.distributed.row_bytes import Column
from spmdrl.memory.call_memory import CallMemory
from spmdrl.observe.own_work import OwnWork, Waits
from spmdrl.roles.kept import Kept, PartialResult, Record, origin_of
from spmdrl.roles.ledger import Interrupted, Ledger, Stint, current, places_of
from spmdrl.supervision.stopping import StopAsked

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", covariant=True)
Other = TypeVar("Other")
Owner = TypeVar("Owner")

ROW_BITS = 40
"""Bits of a row's number on its rank; the bits above them hold the rank, see `unique_atoms`."""


class Role(Protocol):
    """The attributes of a role that `together` needs."""

    name: str
    mesh: Mesh
    memory: CallMemory | None


Use = tuple[str, str]
"""(role, part): a part of a role that a call needs on the device."""


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Result]):
    """A role call that has not started.

    Args:
        role: role whose ranks compute.
        method: the method's name, for messages and the timeline.
        batch: home rows.
        needs: the columns that travel to the role.
        returns: the columns that come home; empty for a call that returns `Metrics`.
        compute: runs on member ranks, on this replica's rows in the role's layout; returns the
            result rows in the same order, or the metrics (JSON values, equal on all members), or
            `Interrupted` if it was asked to stop and can be continued later.
        finish: turns the home rows or metrics into the call's result, on every rank.
        uses: the parts that must be on the device while it computes.
        writes: whether the call changes tensors; on shared ranks, calls that only read run first.
        cost: cost per row for balancing, int64 `[B]`, by default its tokens.
        atom: atom id per row, int64 `[B]`; rows of one atom stay together. By default each is one.
        order: sort key within a replica, int64 `[B]`, by default home order.
        arrange: final decision on atoms and minibatches: a pure function of the world's rows and
            the number of replicas, so that it is the same on every rank.
        settings: all that decides the results besides the rows; a resumed step finds the call by
            it. Values whose `repr` identifies them, equal on all ranks.
        label, is_ahead: see `labelled`; by default the label is `role.method`.
        kept: see `unrecorded`.
    """

    role: Role
    method: str
    batch: Batch
    needs: tuple[str, ...]
    returns: tuple[Column, ...]
    compute: Callable[[Batch, Stint], Any]
    finish: Callable[[Any], Result]
    uses: tuple[Use, ...] = ()
    writes: bool = False
    cost: Tensor | None = None
    atom: Tensor | None = None
    order: Tensor | None = None
    arrange: Callable[[RowTable, int], RowTable] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    is_ahead: bool = False
    kept: bool = True

    def labelled(self, label: str, *, is_ahead: bool = False) -> Self:
        """The call under another name, by which a resumed run finds its result.

        Args:
            is_ahead: the call is for the next step, which looks it up by the same label.
        """
        return replace(self, label=label, is_ahead=is_ahead)

    def unrecorded(self) -> Self:
        """The call without a record of its result for a resumed run; it never stops. For checks."""
        return replace(self, kept=False)

    def then(self, use: Callable[[Result], Other]) -> Call[Other]:
        """The call with its result passed through `use`, on every rank."""
        call: Call[Any] = self
        return replace(call, finish=lambda home: use(self.finish(home)))


class RoleMethod(Generic[Arguments, Result]):
    """`method(...)` runs the call at once; `method.on(...)` describes it for `together`."""

    def __init__(self, describe: Callable[Arguments, Call[Result]]) -> None:
        self._describe = describe

    def on(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Call[Result]:
        return self._describe(*args, **kwargs)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        result: Result = together(self._describe(*args, **kwargs))[0]
        return result


class role_method(Generic[Owner, Arguments, Result]):
    """Makes a method that describes a call a `RoleMethod` of its role."""

    def __init__(self, describe: Callable[Concatenate[Owner, Arguments], Call[Result]]) -> None:
        self._describe = describe

    def __get__(self, role: Owner, kind: type[Owner]) -> RoleMethod[Arguments, Result]:
        return RoleMethod(lambda *args, **kwargs: self._describe(role, *args, **kwargs))


def together(*calls: Call[Any] | None) -> tuple[Any, ...]:
    """Run calls side by side; returns their results in argument order, on every rank; None for None
    in place of a call.

    All rows travel first, then every rank computes for its roles (calls that only read run before
    calls that write, otherwise in argument order), then all results come home. Calls of roles on
    disjoint ranks thus run concurrently. Before a call its parts are brought to the device; parts
    of the rank's next call start to come if the memory plan has room for both.

    In a resumed step, calls that had finished return their kept results if they were made from the
    same rows and settings.

    Raises:
        StopAsked: a stop was asked for; the finished work of the calls is kept.
    """
    made = [call for call in calls if call is not None]
    ledger = current()
    homes = iter(_run(made) if ledger is None else _run_recorded(ledger, made))
    return tuple(None if call is None else call.finish(next(homes)) for call in calls)


def _run(calls: Sequence[Call[Any]]) -> list[Any]:
    """Run calls that nothing is kept of; returns their home results."""
    sent = _send(calls)
    computed = _compute(sent, [Stint()] * len(calls), OwnWork(Waits()))
    return [_bring_home(one, value) for one, value in zip(sent, computed, strict=True)]


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A call whose rows have been exchanged; `rows` is None outside its role."""

    call: Call[Any]
    plan: ExchangePlan
    rows: Batch | None


def _send(calls: Sequence[Call[Any]]) -> list[_Sent]:
    plans = plan_exchanges([_exchange_of(call) for call in calls])
    return [
        _Sent(call=call, plan=plan, rows=send_to_role(plan, call.batch, call.needs))
        for call, plan in zip(calls, plans, strict=True)
    ]


def _compute(sent: Sequence[_Sent], stints: Sequence[Stint], work: OwnWork) -> list[Any]:
    """Compute this rank's calls, readers before writers; None for the calls of other ranks."""
    computed: list[Any] = [None] * len(sent)
    for one in sent:
        work.expect(_name(one.call))
    mine = [i for i, one in enumerate(sent) if one.rows is not None]
    mine.sort(key=lambda i: sent[i].call.writes)
    for index in mine:
        call, rows = sent[index].call, sent[index].rows
        assert rows is not None
        if (memory := call.role.memory) is not None:
            memory.begin(_name(call), call.uses, is_planned=call.kept)
        with work.call(_name(call), call.role.mesh.coordinate("pp")) as count:
            computed[index] = value = call.compute(rows, stints[index])
            count(int((value if isinstance(value, Batch) else rows).lengths.sum()))
    return computed


def _name(call: Call[Any]) -> str:
    return f"{call.role.name}.{call.method}"


def _exchange_of(call: Call[Any]) -> Exchange:
    """Gather the call's row table; the world has the same one on every rank."""
    batch = call.batch
    unique = unique_atoms(batch.num_rows)
    table = gather_rows(
        batch.lengths if call.cost is None else call.cost,
        unique if call.atom is None else call.atom,
        unique if call.order is None else call.order,
    )
    replicas = call.role.mesh.replicas()
    if call.arrange is not None:
        table = call.arrange(table, len(replicas))
    return table, replicas


def unique_atoms(num_rows: int) -> Tensor:
    """An atom for each of this rank's rows that no other row of the world has: int64 `[B]`."""
    return torch.arange(num_rows) + (dist.get_rank() << ROW_BITS)


def _bring_home(sent: _Sent, computed: Any) -> Any:
    call, plan = sent.call, sent.plan
    if call.returns:
        if computed is not None and len(computed) != _rows_of(plan):
            raise ValueError(
                f"{call.role.name}.{call.method} returned {len(computed)} rows for {_rows_of(plan)}"
            )
        return bring_home(plan, computed, call.returns, call.batch.num_rows)
    return broadcast_object(computed, call.role.mesh.ranks[0])


def _rows_of(plan: ExchangePlan) -> int:
    return len(plan.rows_at(dist.get_rank()))


# With a ledger


def _run_recorded(ledger: Ledger, calls: Sequence[Call[Any]]) -> list[Any]:
    """Run calls, except those whose results an earlier start has kept; returns home results."""
    entries = [_entry(ledger, call) for call in calls]
    # kept results first: the ledger then holds them again if a stop comes while the others run
    found = {
        i: ledger.recall(entry, places_of(call.atom) if call.returns else None).home
        for i, (call, entry) in enumerate(zip(calls, entries, strict=True))
        if entry is not None and entry.record is not None
    }
    todo = [i for i in range(len(calls)) if i not in found]
    fresh = _run_kept(ledger, [calls[i] for i in todo], [entries[i] for i in todo])
    found |= zip(todo, fresh, strict=True)
    return [found[i] for i in range(len(calls))]


def _run_kept(
    ledger: Ledger, calls: Sequence[Call[Any]], entries: Sequence[Kept | None]
) -> list[Any]:
    """Run calls that are not finished yet; returns their home results, all of which are kept."""
    if not calls:
        return []
    names = "+".join(_name(call) for call in calls)
    ledger.enter(names, "; ".join(_shapes(call) for call in calls))
    sent = _send(calls)
    ledger.stage("computing")
    computed = _compute(sent, [ledger.stint(entry) for entry in entries], ledger.work)
    ledger.stage("returning")
    stopped = [isinstance(value, Interrupted) for value in computed]
    entries, are_stopped, stop = ledger.agree(entries, stopped)
    homes = []
    for one, entry, value, is_stopped in zip(sent, entries, computed, are_stopped, strict=True):
        if is_stopped:
            ledger.suspend(entry, _part(value))
            continue
        home = _bring_home(one, value)
        if one.call.returns:
            ledger.record(entry, Record(rows=home, places=places_of(one.call.atom)))
        else:
            ledger.record(entry, Record(values=home))
        homes.append(home)
    ledger.stage("between")
    if stop:
        raise StopAsked
    return homes


def _entry(ledger: Ledger, call: Call[Any]) -> Kept | None:
    if not call.kept:
        return None
    return ledger.open(
        f"{call.role.name}.{call.method}" if call.label is None else call.label,
        origin_of(ledger.settings_of(call.role.name, call.settings), call.batch, call.needs),
        writes=call.writes,
        is_ahead=call.is_ahead,
    )


def _part(computed: Any) -> PartialResult | None:
    """This rank's partial result of a call that was stopped here or on another rank."""
    if isinstance(computed, Interrupted):
        return computed.part
    assert computed is None or isinstance(computed, Batch), type(computed)
    return None if computed is None else PartialResult(rows=computed)


def _shapes(call: Call[Any]) -> str:
    """The columns that travel, without the number of rows: equal on all ranks."""
    batch, texts = call.batch, []
    for name in sorted(call.needs):
        if name in batch.tokens or name in batch.rows:
            column = batch[name]
            texts.append(f"{name} {str(column.dtype)[6:]}{list(column.shape[1:])}")
        elif name in batch.ragged:
            texts.append(f"{name} ragged {str(batch.ragged[name].values.dtype)[6:]}")
    return ", ".join(texts)
