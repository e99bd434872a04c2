"""The row exchange: home layout -> a role's layout -> home.

Its plan (`exchange_plan`) is a pure function of values that every rank has (the gathered row table
and the role's replicas), so all ranks make the same one without further messages. One
`all_to_all_single` of bytes then carries all columns of all rows, texts as UTF-8. Home columns are
on the host, so that ranks with and without a GPU exchange rows the same way (gloo).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.distributed.exchange_plan import ExchangePlan, RowTable
from spmdrl.distributed.reduce import gather_table
from spmdrl.distributed.row_bytes import Column, pack_rows, unpack_rows


def gather_rows(cost: Tensor, atom: Tensor, order: Tensor) -> RowTable:
    """Gather the world's row table from each rank's columns (all int64 `[B]`), in one minibatch."""
    table, counts = gather_table(torch.stack([cost, atom, order], dim=1).cpu())
    home = torch.from_numpy(np.repeat(np.arange(len(counts)), counts.numpy()))
    return RowTable(
        home=home,
        cost=table[:, 0].contiguous(),
        atom=table[:, 1].contiguous(),
        order=table[:, 2].contiguous(),
        minibatch=torch.zeros_like(home),
    )


def send_to_role(plan: ExchangePlan, batch: Batch, names: Sequence[str]) -> Batch | None:
    """Send home rows to their replicas; returns this rank's rows there, None outside the role.

    The row column `minibatch` is added. `batch` must have the columns of `names`, with the same
    kinds and dtypes on every rank, even without rows. Python columns stay Python columns.

    Raises:
        ValueError: a column is missing, a Python column has values other than str and None, or
            another rank's column has another kind, dtype or trailing dims.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = batch.keep(names)
    columns = _schema(sent)
    going = plan.rows_from(rank)
    leaving = torch.cat([plan.home[:0], *going.values()])
    packed = pack_rows(
        sent.select(plan.place[leaving]), columns, [len(rows) for rows in going.values()]
    )
    outgoing: dict[int, np.ndarray] = {}
    for index, data in zip(going, packed, strict=True):
        outgoing |= dict.fromkeys(plan.replicas[index], data)
    arriving = plan.rows_at(rank)
    sources = plan.home[arriving]
    came = _exchange(outgoing, torch.bincount(sources, minlength=size), columns)
    if plan.replica_of(rank) is None:
        return None
    # rows arrive grouped by source rank, in this rank's order within each group
    arrival = torch.argsort(sources, stable=True)
    here = came.select(torch.argsort(arrival))
    return here.with_columns(rows={"minibatch": plan.minibatch[arriving]})


def bring_home(
    plan: ExchangePlan, result: Batch | None, columns: Sequence[Column], home_rows: int
) -> Batch:
    """Send a role's result rows (in the order they had there) back to their home places.

    Only the first rank of each replica sends. Rows may have new lengths.

    Raises:
        ValueError: `result` lacks a declared column, or has it with another dtype or shape.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    own = plan.replica_of(rank)
    outgoing: dict[int, np.ndarray] = {}
    if own is not None and plan.replicas[own][0] == rank:
        assert result is not None, "a member rank must return a result"
        homes = plan.home[plan.rows_of(own)]
        targets, sizes = torch.unique(homes, return_counts=True)
        packed = pack_rows(
            result.select(torch.argsort(homes, stable=True)), columns, sizes.tolist()
        )
        outgoing = dict(zip(targets.tolist(), packed, strict=True))
    # rows arrive grouped by the first rank of their replica, in the replica's order
    coming = {plan.replicas[index][0]: rows for index, rows in plan.rows_from(rank).items()}
    counts = torch.zeros(size, dtype=torch.int64)
    for source, rows in coming.items():
        counts[source] = len(rows)
    came = _exchange(outgoing, counts, columns)
    order = torch.cat([plan.place[coming[source]] for source in sorted(coming)] or [plan.home[:0]])
    assert len(order) == home_rows, (len(order), home_rows)
    return came.select(torch.argsort(order))


def _schema(batch: Batch) -> tuple[Column, ...]:
    token = [
        Column(name=n, kind="token", dtype=c.dtype, shape=tuple(c.shape[1:]))
        for n, c in sorted(batch.tokens.items())
    ]
    row = [
        Column(name=n, kind="row", dtype=c.dtype, shape=tuple(c.shape[1:]))
        for n, c in sorted(batch.rows.items())
    ]
    text = [Column(name=n, kind="text", dtype=torch.uint8) for n in sorted(batch.objects)]
    ragged = [
        Column(name=n, kind="ragged", dtype=c.values.dtype) for n, c in sorted(batch.ragged.items())
    ]
    return (*token, *row, *text, *ragged)


def _exchange(
    outgoing: Mapping[int, np.ndarray], counts: Tensor, columns: Sequence[Column]
) -> Batch:
    """Run one all-to-all of bytes; returns the rows that came, by source rank.

    Args:
        outgoing: bytes (uint8) by target rank; ranks that get none are left out.
        counts: number of rows from each rank, `[world size]`.
    """
    sizes, targets = torch.zeros_like(counts), sorted(outgoing)
    for target in targets:
        sizes[target] = len(outgoing[target])
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes)
    received = torch.empty(int(incoming.sum()), dtype=torch.uint8)
    nothing = np.empty(0, dtype=np.uint8)
    sent = torch.from_numpy(np.concatenate([nothing, *(outgoing[t] for t in targets)]))
    dist.all_to_all_single(received, sent, incoming.tolist(), sizes.tolist())
    return unpack_rows(received.numpy(), incoming, counts, columns)
