"""The row exchange on gloo ranks: every row arrives whole, and its result comes home."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.distributed.exchange import (
    Column,
    bring_home,
    gather_rows,
    send_to_role,
)
from spmdrl.distributed.exchange_plan import plan_exchange
from spmdrl.distributed.mesh import Mesh
from spmdrl.world import World

NAMES = ("tokens", "half", "flag", "wide", "small", "id")
TEXTS = ("answer", "note")
RETURNS = (
    Column(name="answer", dtype=torch.int64),
    Column(name="mask", dtype=torch.bool),
    Column(name="pair", dtype=torch.bfloat16, shape=(2,)),
    Column(name="score", kind="row", dtype=torch.float64),
    Column(name="good", kind="row", dtype=torch.bool),
    Column(name="why", kind="text", dtype=torch.uint8),
)
PIECES = ("", "a", "ä", "日本", "🙂", "\n\0", "\ud800", "x" * 300)

LAYOUTS: dict[int, list[tuple[list[int], dict[str, int]]]] = {
    1: [([0], {})],
    2: [([0, 1], {"dp_replicate": 2}), ([0, 1], {"tp": 2}), ([1], {})],
    3: [([0, 2], {"dp_shard": 2}), ([1, 2], {"tp": 2}), ([0, 1, 2], {"dp_replicate": 3})],
    4: [([0, 1, 2, 3], {"dp_replicate": 2, "tp": 2}), ([0, 1, 3], {"cp": 3}), ([2, 3], {"tp": 2})],
}


def whole(seed: int, num_rows: int) -> Batch:
    """The world's rows, some of no tokens, with one column of every kind."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (num_rows,), generator=generator)
    count = int(lengths.sum())
    return Batch(
        lengths=lengths,
        tokens={
            "tokens": torch.randint(0, 99, (count,), generator=generator),
            "half": torch.randn(count, generator=generator).bfloat16(),
            "flag": torch.rand(count, generator=generator) < 0.5,
            "wide": torch.randn(count, 3, generator=generator),
        },
        rows={
            "id": torch.arange(num_rows),
            "small": torch.randint(0, 9, (num_rows, 2), generator=generator).to(torch.int8),
            "order": torch.randperm(num_rows, generator=generator),
        },
        objects={
            "answer": [f"{PIECES[i % 8]}{i}{PIECES[i * 3 % 8]}" for i in range(num_rows)],
            "note": [(None, *PIECES)[i * 5 % 9] for i in range(num_rows)],
            "anything": [{"row": i} for i in range(num_rows)],
        },
    )


def answer(rows: Batch) -> Batch:
    """Results that depend on the row alone; their lengths differ from those that came."""
    ids = rows["id"]
    lengths = (ids * 7) % 4
    row = torch.repeat_interleave(ids, lengths)
    return Batch(
        lengths=lengths,
        tokens={
            "answer": row * 10,
            "mask": row % 2 == 0,
            "pair": torch.stack([row, -row], dim=1).bfloat16(),
        },
        rows={"score": ids.double() / 3, "good": ids % 3 == 0},
        objects={"why": [None if i % 4 == 1 else f"{PIECES[i % 8]} {i}" for i in ids.tolist()]},
    )


def assert_equal(got: Batch, expected: Batch, names: tuple[str, ...]) -> None:
    assert got.lengths.tolist() == expected.lengths.tolist()
    for name in names:
        if name in expected.objects:
            assert list(got.objects[name]) == list(expected.objects[name]), name
            continue
        assert got[name].dtype == expected[name].dtype, name
        assert torch.equal(got[name], expected[name]), name


def round_trips(world: World, num_rounds: int) -> None:
    for number, (ranks, degrees) in enumerate(LAYOUTS[world.size]):
        mesh = Mesh("role", ranks, degrees, "cpu")
        for seed in range(num_rounds):
            round_trip(world, mesh, 100 * number + seed, num_rows=[0, 1, 11, 23][seed % 4])


def round_trip(world: World, mesh: Mesh, seed: int, num_rows: int) -> None:
    everything = whole(seed, num_rows)
    generator = torch.Generator().manual_seed(seed)
    homes = torch.randint(0, world.size, (num_rows,), generator=generator)
    homes[homes == seed % (world.size + 1)] = 0  # one rank has no rows at home, as a rule
    mine = everything.select((homes == world.rank).nonzero().flatten())
    table = gather_rows(mine.lengths, mine["id"] // 2, mine["order"])
    plan = plan_exchange(table, mesh.replicas())
    here = send_to_role(plan, mine, (*NAMES, *TEXTS))
    assert (here is not None) == mesh.is_member
    result = None
    if here is not None:
        assert set(here.columns()) == {*NAMES, *TEXTS, "minibatch"}
        assert set(here.objects) == set(TEXTS)
        assert_equal(here, everything.select(here["id"]), (*NAMES, *TEXTS))
        assert len(here) == len(plan.rows_of(mesh.coordinate("dp")))
        order = everything["order"][here["id"]].tolist()
        assert order == sorted(order)
        result = answer(here)
    home = bring_home(plan, result, RETURNS, len(mine))
    assert set(home.columns()) == {column.name for column in RETURNS}
    assert_equal(home, answer(mine), tuple(column.name for column in RETURNS))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_travel_to_the_role_and_home(world_size: int) -> None:
    run_ranks(round_trips, world_size, 8)


def declared_badly(world: World, columns: tuple[Column, ...]) -> str:
    rows = from_rows([[1, 2], [3]], rows={"id": torch.arange(2)})
    order = torch.arange(2)
    plan = plan_exchange(gather_rows(rows.lengths, order, order), [(0,)])
    here = send_to_role(plan, rows, ("tokens", "id"))
    assert here is not None
    with pytest.raises(ValueError) as caught:
        bring_home(plan, answer(here), columns, 2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (Column(name="absent"), ["token column 'absent'", "'answer'"]),
        (Column(name="answer", kind="row", dtype=torch.int64), ["row column 'answer'"]),
        (Column(name="answer", kind="text"), ["text column 'answer'", "'why'"]),
        (Column(name="answer", dtype=torch.float32), ["'answer'", "torch.float32", "torch.int64"]),
        (Column(name="pair", dtype=torch.bfloat16), ["'pair'", "(2,)"]),
    ],
)
def test_a_result_that_is_not_as_declared_is_named(column: Column, words: list[str]) -> None:
    [message] = run_ranks(declared_badly, 1, (column,))
    assert [word for word in words if word not in message] == []


def sent_badly(world: World) -> list[str]:
    messages = []
    order = torch.arange(2)
    rows = from_rows([[1, 2], [3]], objects={"text": ["a", 2], "bytes": [None, b"b"]})
    plan = plan_exchange(gather_rows(rows.lengths, order, order), [(0, 1)])
    for name in ("absent", "text", "bytes"):
        with pytest.raises(ValueError) as caught:
            send_to_role(plan, rows, ("tokens", name))
        messages.append(str(caught.value))
    return messages


def test_a_needed_column_that_cannot_be_sent_is_named() -> None:
    for missing, number, raw in run_ranks(sent_badly, 2):
        assert "'absent'" in missing
        assert "'text' has a int in row 1" in number
        assert "'bytes' has a bytes in row 1" in raw


TEXT_ROWS: list[list[str | None]] = [["ä", "", None], [], ["🙂 ok", None], [""]]


def sent_texts(world: World, replicas: list[tuple[int, ...]]) -> list[Any] | None:
    """The texts that arrive here, each with its home rank."""
    mine = TEXT_ROWS[world.rank]
    rows = from_rows(
        [[world.rank]] * len(mine), objects={"text": mine, "stays": [object()] * len(mine)}
    )
    order = torch.arange(len(mine))
    plan = plan_exchange(gather_rows(rows.lengths, order, order), replicas)
    here = send_to_role(plan, rows, ("text", "tokens"))
    if here is None:
        return None
    assert set(here.objects) == {"text"}
    return list(zip(here["tokens"].tolist(), here.objects["text"], strict=True))


def test_texts_arrive_where_the_role_is() -> None:
    # by atom, the place at home, then by the order, the place at home as well
    assert run_ranks(sent_texts, 2, [(1,)]) == [None, [(0, "ä"), (0, ""), (0, None)]]
    everything = [(0, "ä"), (2, "🙂 ok"), (3, ""), (0, ""), (2, None), (0, None)]
    assert run_ranks(sent_texts, 4, [(1, 3)]) == [None, everything, None, everything]
    # atom 0 (three rows) to the first replica, atoms 1 and 2 (two and one) to the second
    assert run_ranks(sent_texts, 4, [(0,), (1,)]) == [everything[:3], everything[3:], None, None]


def sent_as_two_kinds(world: World) -> str:
    """Rank 1 has no rows, and a tensor column where rank 0 has texts."""
    if world.is_first:
        rows = from_rows([[1]], objects={"x": ["text"]})
    else:
        rows = from_rows([], rows={"x": torch.zeros(0)})
    order = torch.arange(len(rows))
    plan = plan_exchange(gather_rows(rows.lengths, order, order), [(0, 1)])
    try:
        send_to_role(plan, rows, ("x",))
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_on_a_kind_are_told_so() -> None:
    messages = run_ranks(sent_as_two_kinds, 2)
    assert messages[0] == ""
    assert "rank 0 sends the columns [\"text 'x' torch.uint8 ()\"]" in messages[1]
    assert "row 'x' torch.float32" in messages[1]


def sent_with_two_dtypes(world: World) -> str:
    """Rank 1 has no rows, and its empty column has another dtype than rank 0's."""
    count = 2 if world.is_first else 0
    dtype = torch.int64 if world.is_first else torch.float32
    rows = Batch(
        lengths=torch.ones(count, dtype=torch.int64), tokens={"x": torch.zeros(count, dtype=dtype)}
    )
    order = torch.arange(count)
    plan = plan_exchange(gather_rows(rows.lengths, order, order), [(0, 1)])
    try:
        send_to_role(plan, rows, ("x",))
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_on_a_dtype_are_told_so() -> None:
    messages = run_ranks(sent_with_two_dtypes, 2)
    assert messages[0] == ""
    assert "rank 0 sends the columns [\"token 'x' torch.int64 ()\"]" in messages[1]
    assert "torch.float32" in messages[1]


def plan_made(world: World) -> Any:
    """A rank's own rows and what they become in the table that all ranks share."""
    count = world.rank * 2
    base = 100 * world.rank
    cost = torch.arange(count) + base
    table = gather_rows(cost, cost + 1, cost + 2)
    return [x.tolist() for x in (table.home, table.cost, table.atom, table.order, table.minibatch)]


def test_every_rank_gathers_the_same_table() -> None:
    costs = [100, 101, 200, 201, 202, 203]
    expected = [
        [1, 1, 2, 2, 2, 2],
        costs,
        [c + 1 for c in costs],
        [c + 2 for c in costs],
        [0] * 6,
    ]
    assert run_ranks(plan_made, 3) == [expected] * 3
