"""Role calls, and `together`.

A role is a handle that every rank holds: a mesh, and on the mesh's ranks a backend or an engine.
A role call takes home rows to the role's layout, computes on the member ranks, and brings the
results home. `role.method(batch)` runs it; `role.method.on(batch)` only describes it, for
`together`, which exchanges the rows of several calls first, lets each rank compute for the roles it
belongs to, and then brings all results home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.exchange import (
    Column,
    ExchangePlan,
    RowTable,
    bring_home,
    gather_rows,
    plan_exchange,
    send_to_role,
)
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.reduce import broadcast_object
from spmdrl.ledger import current
from spmdrl.memory.turns import Turns

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", covariant=True)


class Role(Protocol):
    """What `together` needs of a role."""

    name: str
    mesh: Mesh
    memory: Turns | None


Use = tuple[str, str]
"""(role, part): a part of a role that a call needs on the device."""


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Result]):
    """A role call that has not started.

    Args:
        role: whose ranks compute.
        method: the method's name, for messages and the timeline.
        batch: home rows.
        needs: the columns that travel to the role.
        returns: the columns that come home; empty for a call that returns `Metrics`.
        compute: runs on member ranks, on this replica's rows in the role's layout; returns the
            result rows in the same order, or the metrics (equal on all members).
        finish: turns what came home (rows, or metrics) into the call's result, on every rank.
        uses: the parts that must be on the device while it computes.
        writes: whether the call changes tensors; of calls on shared ranks, readers run first.
        cost: what balancing counts per row, int64 `[B]`; default: tokens.
        atom: rows that must stay together, int64 `[B]`; default: each row for itself.
        order: place within a replica, int64 `[B]`; default: home order.
        arrange: last word on atoms and minibatches: a pure function of the world's rows and the
            number of replicas, so that it decides alike on every rank.
    """

    role: Role
    method: str
    batch: Batch
    needs: tuple[str, ...]
    returns: tuple[Column, ...]
    compute: Callable[[Batch], Any]
    finish: Callable[[Any], Result]
    uses: tuple[Use, ...] = ()
    writes: bool = False
    cost: Tensor | None = None
    atom: Tensor | None = None
    order: Tensor | None = None
    arrange: Callable[[RowTable, int], RowTable] | None = None


class RoleMethod(Generic[Arguments, Result]):
    """`method(...)` runs the call at once; `method.on(...)` describes it for `together`."""

    def __init__(self, describe: Callable[Arguments, Call[Result]]) -> None:
        self._describe = describe

    def on(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Call[Result]:
        return self._describe(*args, **kwargs)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        result: Result = together(self._describe(*args, **kwargs))[0]
        return result


def together(*calls: Call[Any]) -> tuple[Any, ...]:
    """Run calls side by side; their results in argument order, on every rank.

    All rows travel first, then every rank computes for its roles (calls that only read run before
    calls that write, otherwise in argument order), then all results come home. Calls of roles on
    disjoint ranks thus run concurrently. Before a call the parts it uses are brought to the device,
    and those of the rank's next call start to come where there is room for both.
    """
    ledger = current()
    if ledger is not None and calls:
        names = "+".join(f"{call.role.name}.{call.method}" for call in calls)
        ledger.enter(names, "; ".join(_shapes(call) for call in calls))
    plans = [_plan(call) for call in calls]
    sent = [send_to_role(p, c.batch, c.needs) for p, c in zip(plans, calls, strict=True)]
    if ledger is not None:
        ledger.stage("computing")
    computed: list[Any] = [None] * len(calls)
    mine = [i for i, rows in enumerate(sent) if rows is not None]
    mine.sort(key=lambda i: calls[i].writes)
    for place, index in enumerate(mine):
        call, rows = calls[index], sent[index]
        assert rows is not None
        if (memory := call.role.memory) is not None:
            following = [use for i in mine[place + 1 : place + 2] for use in calls[i].uses]
            memory.begin(f"{call.role.name}.{call.method}", call.uses, following)
        computed[index] = call.compute(rows)
    if ledger is not None:
        ledger.stage("returning")
    results = tuple(_home(*item) for item in zip(calls, plans, computed, strict=True))
    if ledger is not None:
        ledger.stage("between")
    return results


def _shapes(call: Call[Any]) -> str:
    """The columns that travel, apart from how many rows there are: equal on all ranks."""
    batch, texts = call.batch, []
    for name in sorted(call.needs):
        if name in batch.tokens or name in batch.rows:
            column = batch[name]
            texts.append(f"{name} {str(column.dtype)[6:]}{list(column.shape[1:])}")
    return ", ".join(texts)


def _plan(call: Call[Any]) -> ExchangePlan:
    batch = call.batch
    # the default atom is unique in the world: the rank stands in the high bits
    unique = torch.arange(batch.num_rows) + (dist.get_rank() << 40)
    table = gather_rows(
        batch.lengths if call.cost is None else call.cost,
        unique if call.atom is None else call.atom,
        unique if call.order is None else call.order,
    )
    replicas = call.role.mesh.replicas()
    if call.arrange is not None:
        table = call.arrange(table, len(replicas))
    return plan_exchange(table, replicas)


def _home(call: Call[Any], plan: ExchangePlan, computed: Any) -> Any:
    if call.returns:
        if computed is not None and len(computed) != _rows_of(plan):
            raise ValueError(
                f"{call.role.name}.{call.method} returned {len(computed)} rows for {_rows_of(plan)}"
            )
        return call.finish(bring_home(plan, computed, call.returns, call.batch.num_rows))
    return call.finish(broadcast_object(computed, call.role.mesh.ranks[0]))


def _rows_of(plan: ExchangePlan) -> int:
    own = plan.replica_of(dist.get_rank())
    return 0 if own is None else len(plan.rows[own])
