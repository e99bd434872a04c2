"""Role calls and `together`, with roles whose compute is arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from harness import run_ranks
from spmdrl.batch import Batch, from_rows
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.minibatches import into_minibatches
from spmdrl.distributed.row_bytes import Column
from spmdrl.roles.calls import Call, RoleMethod, together
from spmdrl.roles.ledger import Stint
from spmdrl.world import World


@dataclass
class Toy:
    """A role that holds one number: `add` returns tokens + number, `train` changes the number."""

    name: str
    mesh: Mesh
    memory: None = None
    number: int = 0
    trace: list[str] = field(default_factory=list)

    def add(self, batch: Batch) -> Call[Batch]:
        def compute(rows: Batch, stint: Stint) -> Batch:
            self.trace.append(f"{self.name}.add")
            return Batch(lengths=rows.lengths, tokens={self.name: rows["tokens"] + self.number})

        return Call(
            role=self,
            method="add",
            batch=batch,
            needs=("tokens",),
            returns=(Column(name=self.name, dtype=torch.int64),),
            compute=compute,
            finish=lambda home: batch | home,
        )

    def train(self, batch: Batch, pause_s: float = 0.0) -> Call[dict[str, Any]]:
        def compute(rows: Batch, stint: Stint) -> dict[str, Any]:
            self.trace.append(f"{self.name}.train")
            time.sleep(pause_s)
            self.number += 1
            return {"number": self.number, "minibatches": rows["minibatch"].unique().tolist()}

        return Call(
            role=self,
            method="train",
            batch=batch,
            needs=("tokens", "group"),
            returns=(),
            compute=compute,
            finish=lambda metrics: metrics,
            writes=True,
            atom=batch["group"],
            arrange=into_minibatches(2, seed=0, step=0),
        )


def home_rows(world: World, count: int) -> Batch:
    """`count` rows of 1 to `count` tokens; the token values name rank and row."""
    rows = [[100 * world.rank + i] * (i + 1) for i in range(count)]
    return from_rows(rows, rows={"group": torch.arange(count) + 10 * world.rank})


def toy(name: str, ranks: list[int], number: int = 0, **degrees: int) -> Toy:
    return Toy(name=name, mesh=Mesh(name, ranks, degrees, "cpu"), number=number)


def disjoint(world: World) -> dict[str, Any]:
    a = toy("a", [0], 1000)
    b = toy("b", [1, 2], 2000, dp_replicate=2)
    batch = home_rows(world, world.rank)  # rank 0 has no rows
    one, nothing, metrics, two = together(a.add(batch), None, b.train(batch), b.add(batch))
    assert nothing is None
    again = RoleMethod(b.add)(batch)
    return {
        "one": (one["a"] - one["tokens"]).tolist(),
        "two": (two["b"] - two["tokens"]).tolist(),
        "again": (again["b"] - again["tokens"]).tolist(),
        "metrics": metrics["number"],
        "trace": (a.trace, b.trace),
    }


def test_disjoint_roles_side_by_side() -> None:
    for rank, result in enumerate(run_ranks(disjoint, 3)):
        count = rank * (rank + 1) // 2
        # results in argument order; the reader saw the number before the writer changed it
        assert result["one"] == [1000] * count
        assert result["two"] == [2000] * count
        assert result["again"] == [2001] * count
        # metrics reach the rank outside the role too
        assert result["metrics"] == 2001
        members = ["b.add", "b.train", "b.add"]
        assert result["trace"] == ((["a.add"], []) if rank == 0 else ([], members))


def shared(world: World) -> Any:
    a, b = toy("a", [0, 1], tp=2), toy("b", [0, 1], 5, dp_replicate=2)
    batch = home_rows(world, 3)
    results = together(a.train(batch), b.add(batch), a.add(batch), b.train(batch))
    kinds = ["number" if isinstance(r, dict) else r.columns() for r in results]
    order = [name.split(".") for name in a.trace + b.trace]
    return kinds, order, (results[2]["a"] - results[2]["tokens"]).unique().tolist()


def test_readers_run_before_writers_on_shared_ranks() -> None:
    kinds = ["number", ["b", "group", "tokens"], ["a", "group", "tokens"], "number"]
    order = [["a", "add"], ["a", "train"], ["b", "add"], ["b", "train"]]
    assert run_ranks(shared, 2) == [(kinds, order, [0])] * 2


def nothing(world: World) -> Any:
    role = toy("a", [1])
    empty = home_rows(world, 0)
    rows, metrics = together(role.add(empty), role.train(empty))
    assert together() == ()
    return len(rows), rows["a"].dtype, metrics["minibatches"]


def test_a_call_without_rows_in_the_whole_world() -> None:
    assert run_ranks(nothing, 2) == [(0, torch.int64, [])] * 2


def slow_writers(world: World) -> float:
    a, b = toy("a", [0]), toy("b", [1])
    batch = home_rows(world, 1)
    torch.distributed.barrier()
    start = time.monotonic()
    together(a.train(batch, 0.4), b.train(batch, 0.4))
    return time.monotonic() - start


def test_disjoint_roles_compute_at_the_same_time() -> None:
    assert max(run_ranks(slow_writers, 2)) < 0.7


def wrong_count(world: World) -> str:
    role = toy("a", [0])
    batch = home_rows(world, 3)
    call = role.add(batch)
    broken = Call(
        role=role,
        method="lose",
        batch=batch,
        needs=call.needs,
        returns=call.returns,
        compute=lambda rows, stint: call.compute(rows, stint).select([0]),
        finish=call.finish,
    )
    with pytest.raises(ValueError) as caught:
        together(broken)
    return str(caught.value)


def test_a_role_that_loses_rows_is_named() -> None:
    assert run_ranks(wrong_count, 1) == ["a.lose returned 1 rows for 3"]
