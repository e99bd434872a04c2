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
        order: global row numbers, replica by replica, `[N]`.
        counts: number of rows of each replica.
        home: home rank of each global row, `[N]`.
        place: index of each global row in its home batch, `[N]`.
        minibatch: minibatch of each global row, `[N]`.
    """

    replicas: tuple[tuple[int, ...], ...]
    order: Tensor
    counts: Tensor
    home: Tensor
    place: Tensor
    minibatch: Tensor

    def replica_of(self, rank: int) -> int | None:
        # each rank asks for its own alone: a table of all ranks would take longer to make
        return next((i for i, ranks in enumerate(self.replicas) if rank in ranks), None)

    def rows_at(self, rank: int) -> Tensor:
        """The global rows that `rank` takes, in its order; empty outside the role."""
        own = self.replica_of(rank)
        return self.home.new_empty(0) if own is None else self.rows_of(own)

    def rows_of(self, replica: int) -> Tensor:
        """The global rows of a replica, in its order."""
        last = int(self._ends[replica])
        return self.order[last - int(self.counts[replica]) : last]

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
    def _ends(self) -> Tensor:
        return self.counts.cumsum(0)

    @cached_property
    def _seats(self) -> tuple[Tensor, Tensor]:
        """The replica of each global row, and its index there: both `[N]`."""
        order, counts = self.order.numpy(), self.counts.numpy()
        replica, position = np.empty_like(order), np.empty_like(order)
        replica[order] = np.repeat(np.arange(len(counts)), counts)
        position[order] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
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
    minibatch, order = table.minibatch.numpy(), table.order.numpy()
    place = replica * (1 + minibatch.max(initial=0)) + minibatch
    # stable, so the last key is the global index
    if (order[1:] >= order[:-1]).all():
        order = _sorted_by(place)
    else:
        order = np.lexsort((order, place))
    return ExchangePlan(
        replicas=tuple(tuple(ranks) for ranks in replicas),
        order=torch.from_numpy(order),
        counts=torch.from_numpy(np.bincount(replica, minlength=len(replicas))),
        home=table.home,
        place=_place_at_home(table.home),
        minibatch=table.minibatch,
    )


def _sorted_by(keys: np.ndarray) -> np.ndarray:  # int64 [N], none negative
    """A stable order by these keys, int64 `[N]`."""
    small = np.dtype(np.uint16)  # which numpy sorts by digits, many times as fast
    if keys.max(initial=0) <= np.iinfo(small).max:
        keys = keys.astype(small)
    return np.argsort(keys, kind="stable")


def _assign(
    minibatch: np.ndarray, atom: np.ndarray, cost: np.ndarray, num_replicas: int
) -> np.ndarray:  # all int64 [N]
    """The replica of every row, int64 `[N]`."""
    if len(atom) == 0:
        return np.zeros(0, dtype=np.int64)
    # rows of one atom and minibatch, together
    by_atom = np.argsort(atom, kind="stable")
    by_atom = by_atom[_sorted_by(minibatch[by_atom])]
    minibatch, atom, cost = minibatch[by_atom], atom[by_atom], cost[by_atom]
    is_first = np.append(True, (np.diff(minibatch) != 0) | (np.diff(atom) != 0))
    firsts = np.flatnonzero(is_first)
    weights, minibatch = np.add.reduceat(cost, firsts), minibatch[firsts]
    # stable, and atoms ascend already
    largest_first = _sorted_by(weights.max() - weights)
    largest_first = largest_first[_sorted_by(minibatch[largest_first])]
    target = np.empty(len(firsts), dtype=np.int64)
    cuts = np.flatnonzero(np.diff(minibatch)) + 1  # equal before and after the sort
    for members in np.split(largest_first, cuts):
        target[members] = _balance(weights[members], num_replicas)
    found = np.empty(len(atom), dtype=np.int64)
    found[by_atom] = target[np.cumsum(is_first) - 1]
    return found


_FEW, _MANY = 32, 256
"""So few weights take longer at once than one by one; so many follow one by one then."""


def _balance(weights: np.ndarray, num_replicas: int) -> np.ndarray:  # int64 [N], descending
    """Give each weight in turn to the replica with the least sum so far, ties by replica.

    The next weights go to the least sums in ascending order, until one that was given to has become
    less than the next: so many are given at once.
    """
    bits = num_replicas.bit_length()
    mask = (1 << bits) - 1
    # (sum so far, replica) as one number: among equal sums the first replica comes next
    sums, weights = np.arange(num_replicas), weights << bits
    found = np.empty_like(weights)
    first = 0
    while first < len(weights):
        given = weights[first : first + num_replicas]
        count = len(given)
        more = sums[:count] + given
        is_late = sums[1:count] > np.minimum.accumulate(more)[:-1]
        if is_late.any():
            count = int(is_late.argmax()) + 1
        if count >= _FEW:
            found[first : first + count] = sums[:count]
            sums[:count] = more[:count]
        else:
            each, heap = weights[first : first + max(num_replicas, _MANY)].tolist(), sums.tolist()
            count = len(each)
            found[first : first + count] = [
                heapq.heapreplace(heap, heap[0] + weight) for weight in each
            ]
            sums = np.array(heap)
        sums.sort()
        first += count
    return found & mask


def _place_at_home(home: Tensor) -> Tensor:
    counts = torch.bincount(home) if len(home) else torch.zeros(0, dtype=torch.int64)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(home)) - starts[home]
