"""The exchange plan and minibatch membership: pure functions, by properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdrl.distributed.exchange_plan import ExchangePlan, RowTable, plan_exchange
from spmdrl.distributed.minibatches import into_minibatches, split_groups_if_few

Row = tuple[int, int]
"""(cost, atom)"""

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
ROWS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), max_size=40)


def table_of(rows: list[Row], homes: list[int], orders: list[int] | None = None) -> RowTable:
    """A table as `gather_rows` makes it: rows stand by home rank."""
    places = sorted(range(len(rows)), key=lambda i: homes[i])
    orders = list(range(len(rows))) if orders is None else orders
    return RowTable(
        home=torch.tensor([homes[i] for i in places], dtype=torch.int64),
        cost=torch.tensor([rows[i][0] for i in places], dtype=torch.int64),
        atom=torch.tensor([rows[i][1] for i in places], dtype=torch.int64),
        order=torch.tensor([orders[i] for i in places], dtype=torch.int64),
        minibatch=torch.zeros(len(rows), dtype=torch.int64),
    )


def rows_of(plan: ExchangePlan) -> list[torch.Tensor]:
    """Global rows of each replica."""
    return [plan.rows_of(replica) for replica in range(len(plan.replicas))]


def singles(count: int) -> list[tuple[int, ...]]:
    return [(rank,) for rank in range(count)]


@PROPERTY
@given(ROWS, st.integers(1, 5), st.data())
def test_every_row_goes_to_one_replica_and_atoms_stay_whole(
    rows: list[Row], replicas: int, data: st.DataObject
) -> None:
    homes = [data.draw(st.integers(0, 3)) for _ in rows]
    table = table_of(rows, homes)
    plan = plan_exchange(table, singles(replicas))
    assert sorted(torch.cat(rows_of(plan)).tolist()) == list(range(len(rows)))
    owners: dict[int, set[int]] = {}
    for replica, mine in enumerate(rows_of(plan)):
        for atom in table.atom[mine].tolist():
            owners.setdefault(atom, set()).add(replica)
        assert table.order[mine].tolist() == sorted(table.order[mine].tolist())
    assert all(len(found) == 1 for found in owners.values())
    # home and place name each row's own spot: counting up within each home rank
    spots = list(zip(plan.home.tolist(), plan.place.tolist(), strict=True))
    assert spots == [(h, i) for h in range(4) for i in range(homes.count(h))]


@PROPERTY
@given(ROWS, st.integers(1, 5))
def test_balance_is_that_of_largest_first(rows: list[Row], replicas: int) -> None:
    """Without its smallest atom no replica has more than any other (hence Graham's 4/3)."""
    table = table_of(rows, [0] * len(rows))
    load, smallest = [], []
    for mine in rows_of(plan_exchange(table, singles(replicas))):
        weights: dict[int, int] = {}
        for row in mine.tolist():
            atom = int(table.atom[row])
            weights[atom] = weights.get(atom, 0) + int(table.cost[row])
        load.append(sum(weights.values()))
        smallest.append(min(weights.values(), default=0))
    assert max(full - small for full, small in zip(load, smallest, strict=True)) <= min(load)


@PROPERTY
@given(ROWS, st.integers(1, 4), st.data())
def test_the_plan_does_not_depend_on_the_home_split(
    rows: list[Row], replicas: int, data: st.DataObject
) -> None:
    orders = data.draw(st.permutations(range(len(rows))))
    arrange = into_minibatches(3, seed=1, step=2)

    def layout(homes: list[int]) -> list[list[tuple[int, int]]]:
        table = arrange(table_of(rows, homes, orders), replicas)
        plan = plan_exchange(table, singles(replicas))
        return [
            list(zip(table.order[mine].tolist(), table.minibatch[mine].tolist(), strict=True))
            for mine in rows_of(plan)
        ]

    split = [data.draw(st.integers(0, 4)) for _ in rows]
    assert layout(split) == layout([0] * len(rows))


def simple_assignment(table: RowTable, num_replicas: int) -> list[list[int]]:
    """What `plan_exchange` does, in its plainest form."""
    rows = list(enumerate(zip(table.minibatch.tolist(), table.atom.tolist(), strict=True)))
    assigned: list[list[int]] = [[] for _ in range(num_replicas)]
    for minibatch in sorted({key[0] for _, key in rows}):
        load = [0] * num_replicas
        weights: dict[int, int] = {}
        for row, key in rows:
            if key[0] == minibatch:
                weights[key[1]] = weights.get(key[1], 0) + int(table.cost[row])
        for atom in sorted(weights, key=lambda atom: (-weights[atom], atom)):
            target = load.index(min(load))
            load[target] += weights[atom]
            assigned[target] += [row for row, key in rows if key == (minibatch, atom)]
    order = table.order.tolist()
    return [sorted(mine, key=lambda row: (rows[row][1][0], order[row], row)) for mine in assigned]


@PROPERTY
@given(ROWS, st.integers(1, 7), st.integers(1, 4))
def test_the_assignment_is_that_of_the_plainest_form(
    rows: list[Row], replicas: int, num_minibatches: int
) -> None:
    table = into_minibatches(num_minibatches, seed=4, step=1)(
        table_of(rows, [0] * len(rows), [-i for i in range(len(rows))]), replicas
    )
    plan = plan_exchange(table, singles(replicas))
    assert [mine.tolist() for mine in rows_of(plan)] == simple_assignment(table, replicas)


@pytest.mark.parametrize("most", [1, 40, 30_000])
@pytest.mark.parametrize("replicas", [3, 24, 64])
@pytest.mark.parametrize("tail", [1, 4])
def test_many_replicas_are_assigned_as_in_the_plainest_form(
    most: int, replicas: int, tail: int
) -> None:
    """Weights given at once and one by one; with `tail`, a few rows have most of the tokens."""
    generator = torch.Generator().manual_seed(most + replicas)
    share = torch.rand(700, generator=generator).pow(tail)
    rows = [(int(cost), i) for i, cost in enumerate(share.mul(most).round().tolist())]
    orders = torch.randperm(len(rows), generator=generator).tolist()
    table = into_minibatches(2, seed=1, step=1)(table_of(rows, [0] * 700, orders), replicas)
    plan = plan_exchange(table, singles(replicas))
    assert [mine.tolist() for mine in rows_of(plan)] == simple_assignment(table, replicas)


def test_largest_atom_first_by_hand() -> None:
    rows = [(3, 0), (3, 0), (5, 1), (4, 2), (1, 3)]
    plan = plan_exchange(table_of(rows, [0, 0, 0, 1, 1]), [(0, 1), (2, 3)])
    # 6 to the first; 5 and 4 to the second; 1 to the first again
    assert [mine.tolist() for mine in rows_of(plan)] == [[0, 1, 4], [2, 3]]
    assert [plan.replica_of(rank) for rank in range(5)] == [0, 0, 1, 1, None]
    assert plan.rows_at(1).tolist() == [0, 1, 4]
    assert plan.rows_at(4).tolist() == []


def test_each_minibatch_is_balanced_by_itself_and_comes_in_order() -> None:
    table = table_of([(9, 0), (1, 1), (1, 2), (1, 3)], [0] * 4)
    table = replace(table, minibatch=torch.tensor([1, 0, 1, 0]))
    plan = plan_exchange(table, singles(2))
    # were the minibatches balanced together, rows 1, 2 and 3 would all be on the second replica
    assert [mine.tolist() for mine in rows_of(plan)] == [[1, 0], [3, 2]]


def membership(atoms: list[int], count: int, step: int = 5) -> dict[int, int]:
    table = table_of([(1, atom) for atom in atoms], [0] * len(atoms))
    arranged = into_minibatches(count, seed=3, step=step)(table, 2)
    return dict(zip(atoms, arranged.minibatch.tolist(), strict=True))


@pytest.mark.parametrize(("num_atoms", "count"), [(12, 3), (10, 4), (5, 5), (2, 4), (7, 1)])
def test_minibatches_hold_equally_many_whole_atoms(num_atoms: int, count: int) -> None:
    atoms = [atom for atom in range(100, 100 + num_atoms) for _ in range(3)]
    table = table_of([(1, atom) for atom in atoms], [0] * len(atoms))
    minibatch = into_minibatches(count, seed=3, step=5)(table, 2).minibatch
    pairs = set(zip(atoms, minibatch.tolist(), strict=True))
    assert len(pairs) == num_atoms
    sizes = [sum(m == i for _, m in pairs) for i in range(count)]
    assert max(sizes) - min(sizes) <= 1


def test_minibatch_membership_is_keyed_by_seed_step_and_atom_alone() -> None:
    atoms = list(range(24))
    assert membership(atoms, 4) == membership(atoms[::-1], 4)
    assert membership(atoms, 4) != membership(atoms, 4, step=6)


def test_groups_are_split_only_when_they_are_fewer_than_the_replicas() -> None:
    table = table_of([(1, 7), (1, 7), (1, 8), (1, 8)], [0, 0, 1, 1])
    assert split_groups_if_few(table, 2).atom.tolist() == [7, 7, 8, 8]
    split = split_groups_if_few(table, 3)
    assert [len(rows) for rows in rows_of(plan_exchange(split, singles(3)))] == [2, 1, 1]


def test_no_rows_in_the_world() -> None:
    table = into_minibatches(2, seed=0, step=0)(table_of([], []), 2)
    plan = plan_exchange(split_groups_if_few(table, 2), singles(2))
    assert isinstance(plan, ExchangePlan)
    assert [len(rows) for rows in rows_of(plan)] == [0, 0]
