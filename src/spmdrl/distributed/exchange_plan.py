"""`plan_exchange`: which rows go to which replica, and in what order.

A pure function of the gathered row table, which every rank calls in every role call: at thousands
of ranks the world has tens of thousands of rows, so what loops over rows is vectorised.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowTable:
    """All rows of the world, ordered by home rank and then by their index there.

    Args:
        home: home rank of each row, `[N]`.
        cost: cost of each row that balancing counts, usually tokens, `[N]`.
        atom: atom id of each row; the rows of one atom stay together, `[N]`.
        order: sort key of each row within its replica (ties by global index), `[N]`.
        minibatch: minibatch of each row; each minibatch is balanced by itself, `[N]`.
    """

    home: Tensor
    cost: Tensor
    atom: Tensor
    order: Tensor
    minibatch: Tensor


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """The rows of each replica (indices into the `RowTable`), in the order they have there.

    Args:
        replicas: the ranks that take the same rows; the first one sends the results home.
        rows: global row numbers per replica.
        home: home rank of each global row, `[N]`.
        place: index of each global row in its home batch, `[N]`.
        minibatch: minibatch of each global row, `[N]`.
    """

    replicas: tuple[tuple[int, ...], ...]
    rows: tuple[Tensor, ...]
    home: Tensor
    place: Tensor
    minibatch: Tensor

    def replica_of(self, rank: int) -> int | None:
        return self._replica_of.get(rank)

    def rows_at(self, rank: int) -> Tensor:
        """The global rows that `rank` takes, in its order; empty outside the role."""
        own = self.replica_of(rank)
        return self.home.new_empty(0) if own is None else self.rows[own]

    def rows_from(self, rank: int) -> dict[int, Tensor]:
        """The global rows of a home rank by the replica that takes them, in its order there."""
        if rank not in self._leaving:
            mine = (self.home == rank).nonzero().flatten()
            replica, position = self._seats
            mine = mine[torch.argsort(position[mine])]
            where = replica[mine]
            self._leaving[rank] = {
                index: mine[where == index] for index in torch.unique(where).tolist()
            }
        return self._leaving[rank]

    @cached_property
    def _leaving(self) -> dict[int, dict[int, Tensor]]:
        """Results of `rows_from`: calls that share a plan ask for the same ones."""
        return {}

    @cached_property
    def _replica_of(self) -> dict[int, int]:
        return {rank: index for index, ranks in enumerate(self.replicas) for rank in ranks}

    @cached_property
    def _seats(self) -> tuple[Tensor, Tensor]:
        """The replica of each global row, and its index there: both `[N]`."""
        every = torch.cat(self.rows).numpy()
        counts = np.array([len(rows) for rows in self.rows])
        replica, position = np.empty_like(every), np.empty_like(every)
        replica[every] = np.repeat(np.arange(len(counts)), counts)
        position[every] = np.arange(len(every)) - np.repeat(counts.cumsum() - counts, counts)
        return torch.from_numpy(replica), torch.from_numpy(position)


Exchange = tuple[RowTable, Sequence[Sequence[int]]]
"""A table, and the replicas that take its rows."""


def plan_exchanges(exchanges: Sequence[Exchange]) -> list[ExchangePlan]:
    """Plan several exchanges; equal ones, such as those of calls that score the same rows, share
    one plan.
    """
    made: list[tuple[Exchange, ExchangePlan]] = []
    plans = []
    for table, replicas in exchanges:
        found = next((p for (t, r), p in made if r == replicas and _is_equal(t, table)), None)
        if found is None:
            found = plan_exchange(table, replicas)
            made.append(((table, replicas), found))
        plans.append(found)
    return plans


def _is_equal(one: RowTable, other: RowTable) -> bool:
    return all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def plan_exchange(table: RowTable, replicas: Sequence[Sequence[int]]) -> ExchangePlan:
    """Assign atoms to replicas: largest first (ties by atom), each to the replica with the least
    cost so far (ties by replica), minibatch by minibatch.

    Rows within a replica are sorted by (minibatch, order, global index). Longest-processing-time-
    first is within 4/3 of the best makespan (Graham 1969, https://doi.org/10.1137/0117039).
    """
    replica = _assign(
        table.minibatch.numpy(), table.atom.numpy(), table.cost.numpy(), len(replicas)
    )
    # stable, so the last key is the global index
    order = np.lexsort((table.order.numpy(), table.minibatch.numpy(), replica))
    counts = np.bincount(replica, minlength=len(replicas))
    return ExchangePlan(
        replicas=tuple(tuple(ranks) for ranks in replicas),
        rows=torch.split(torch.from_numpy(order), counts.tolist()),
        home=table.home,
        place=_place_at_home(table.home),
        minibatch=table.minibatch,
    )


def _assign(
    minibatch: np.ndarray, atom: np.ndarray, cost: np.ndarray, num_replicas: int
) -> np.ndarray:  # all int64 [N]
    """The replica of every row, int64 `[N]`."""
    if len(atom) == 0:
        return np.zeros(0, dtype=np.int64)
    # rows of one atom and minibatch, together
    by_atom = np.lexsort((atom, minibatch))
    minibatch, atom, cost = minibatch[by_atom], atom[by_atom], cost[by_atom]
    is_first = np.append(True, (np.diff(minibatch) != 0) | (np.diff(atom) != 0))
    firsts = np.flatnonzero(is_first)
    weights = np.add.reduceat(cost, firsts)
    largest_first = np.lexsort((atom[firsts], -weights, minibatch[firsts]))
    target = np.empty(len(firsts), dtype=np.int64)
    cuts = np.flatnonzero(np.diff(minibatch[firsts])) + 1  # equal before and after the sort
    for members in np.split(largest_first, cuts):
        target[members] = _balance(weights[members].tolist(), num_replicas)
    found = np.empty(len(atom), dtype=np.int64)
    found[by_atom] = target[np.cumsum(is_first) - 1]
    return found


def _balance(weights: Sequence[int], num_replicas: int) -> list[int]:
    """Give each weight in turn to the replica with the least sum so far, ties by replica."""
    bits = num_replicas.bit_length()
    mask = (1 << bits) - 1
    # (sum so far, replica) as one number: among equal sums the first replica comes next
    heap, replace = list(range(num_replicas)), heapq.heapreplace
    return [replace(heap, heap[0] + (weight << bits)) & mask for weight in weights]


def _place_at_home(home: Tensor) -> Tensor:
    counts = torch.bincount(home) if len(home) else torch.zeros(0, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(home)) - starts[home]
