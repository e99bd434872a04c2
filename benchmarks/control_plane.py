"""Cost of the control plane on one rank of many, in one process: seconds of CPU and bytes.

    python benchmarks/control_plane.py [--ranks 1024 4096] [--layers 80] [--no-sync]

Rank 0 of a PPO run (a Llama of 70 billion parameters; policy and value of tp 8, dp_shard 64; the
rollout of tp 8) does what it does at its start and in a step: groups, messages of a sync, owners
and index of a checkpoint, plans and tables of the exchanges of seven role calls. Data of the others
are simulated, outside the measured time; rows are short, so that copies do not count. Planning
itself is benchmarks/sync_plan.py's. The lines are a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from spmdrl.batch import Batch
from spmdrl.checkpoint.index import entries_of, index_text
from spmdrl.checkpoint.owners import frozen_slices, only, owned_slices
from spmdrl.distributed import exchange
from spmdrl.distributed.exchange import bring_home, send_to_role
from spmdrl.distributed.exchange_plan import ExchangePlan, RowTable, plan_exchanges
from spmdrl.distributed.groups import ProcessGroups
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.minibatches import into_minibatches, split_groups_if_few
from spmdrl.distributed.row_bytes import Column, pack_rows
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.observe.own_work import find_straggler
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.rank_rounds import rank_rounds
from spmdrl.world import Seat, check_seats

NODE, TP, SHARD, GROUP, ROWS = 8, 8, 64, 16, 4
"""Ranks of a node; degrees; samples of a prompt; rows at home on each rank."""


REPEATS = 3
NOTHING = torch.empty(0, dtype=torch.uint8)


class Meter:
    """CPU seconds and bytes by name; what a simulation takes is not charged."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.num_bytes: dict[str, int] = {}
        self._paused = 0.0

    @contextmanager
    def charge(self, name: str) -> Iterator[None]:
        paused, began = self._paused, time.process_time()
        yield
        passed = time.process_time() - began - (self._paused - paused)
        self.seconds[name] = self.seconds.get(name, 0.0) + passed

    @contextmanager
    def pause(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self._paused += time.process_time() - began

    def count(self, name: str, num_bytes: int) -> None:
        self.num_bytes[name] = self.num_bytes.get(name, 0) + num_bytes


class Others:
    """Collectives of rank 0, with simulated contributions of the other ranks."""

    def __init__(self, meter: Meter, table: Tensor) -> None:  # table [ranks, ROWS, 3]
        self._meter, self.table = meter, table
        self.arriving: list[Tensor] = []
        self.name = ""

    def all_reduce(self, tensor: Tensor, *_: Any, **__: Any) -> None:
        if tensor.numel() == len(self.table):
            tensor.fill_(ROWS)

    def all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        with self._meter.pause():
            for part, value in zip(parts, self.table, strict=True):
                part.copy_(value)
            self._meter.count(self.name, self.table.nbytes)

    def all_gather_into_tensor(self, out: Tensor, own: Tensor) -> None:
        with self._meter.pause():
            out.view(-1).copy_(self.table.reshape(-1))
            self._meter.count(self.name, self.table.nbytes)

    def all_to_all_single(self, out: Tensor, own: Tensor, *splits: Any) -> None:
        with self._meter.pause():
            if not splits:
                out.copy_(torch.tensor([len(part) for part in self.arriving]))
            else:
                out.copy_(torch.cat(self.arriving))
            self._meter.count(self.name, out.nbytes + own.nbytes)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        names = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single")
        originals = {name: getattr(dist, name) for name in names}
        for name in names:
            setattr(dist, name, getattr(self, name))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)


def rows_of_all(size: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """All ranks' rows in one batch, and the group of each."""
    count = size * ROWS
    lengths = torch.randint(8, 40, (count,), generator=generator)
    total = int(lengths.sum())
    names = ("old_logprobs", "reference", "advantages", "returns", "values")
    tokens = {name: torch.rand(total, generator=generator) for name in names}
    tokens["tokens"] = torch.randint(0, 1000, (total,), generator=generator)
    tokens["mask"] = torch.ones(total, dtype=torch.bool)
    return Batch(lengths=lengths, tokens=tokens), torch.arange(count) // GROUP


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """The part of a role call that its exchange depends on."""

    atom: Tensor
    needs: tuple[str, ...]
    returns: tuple[Column, ...] = ()
    arrange: Callable[[RowTable, int], RowTable] | None = None


def simulate(
    meter: Meter,
    others: Others,
    world: Batch,
    replicas: Sequence[tuple[int, ...]],
    calls: Sequence[CallShape],
) -> None:
    """Role calls of rank 0 in one `together`: its rows travel, and results of the same lengths
    come home.
    """
    order, mine = torch.arange(len(world)), world.select(list(range(ROWS)))
    with others.in_place():
        others.name = "row tables and plans"
        with meter.charge(others.name):
            tables = []
            for call in calls:
                with meter.pause():
                    columns = (world.lengths, call.atom, order)
                    others.table = torch.stack(columns, dim=1).reshape(-1, ROWS, 3)
                table = exchange.gather_rows(mine.lengths, call.atom[:ROWS], order[:ROWS])
                if call.arrange is not None:
                    table = call.arrange(table, len(replicas))
                tables.append((table, replicas))
            plans = plan_exchanges(tables)
        for call, plan in zip(calls, plans, strict=True):
            travel(meter, others, world, call, plan)


def travel(meter: Meter, others: Others, world: Batch, call: CallShape, plan: ExchangePlan) -> None:
    size, mine = len(others.table), world.select(list(range(ROWS)))
    columns, rows = exchange._schema(mine.keep(call.needs)), plan.rows_at(0)
    wanted = world.keep(call.needs)
    others.arriving = [NOTHING] * size
    for source in torch.unique(plan.home[rows]).tolist():
        others.arriving[source] = packed(wanted.select(rows[plan.home[rows] == source]), columns)
    others.name = "rows to roles"
    with meter.charge(others.name):
        here = send_to_role(plan, mine, call.needs)
    result = world.select(rows)
    assert here is not None and torch.equal(here["tokens"], result["tokens"])
    if not call.returns:
        return
    others.arriving = results_for(plan, world, call.returns, size)
    others.name = "results home"
    with meter.charge(others.name):
        home = bring_home(plan, result, call.returns, ROWS)
    assert torch.equal(home["tokens"], mine["tokens"])


def packed(rows: Batch, columns: Sequence[Column]) -> Tensor:
    return torch.from_numpy(pack_rows(rows, columns, [len(rows)])[0])


def results_for(
    plan: ExchangePlan, world: Batch, returns: Sequence[Column], size: int
) -> list[Tensor]:
    arriving = [NOTHING] * size
    for index, rows in plan.rows_from(0).items():
        arriving[plan.replicas[index][0]] = packed(world.select(rows), returns)
    return arriving


def step(meter: Meter, size: int) -> None:
    """The exchanges of a step of PPO, and the comparison of the ranks' work."""
    world, groups = rows_of_all(size, torch.Generator().manual_seed(0))
    others = Others(meter, torch.zeros(size, ROWS, 3, dtype=torch.int64))
    replicas = [tuple(range(a, a + TP)) for a in range(0, size, TP)]
    single = torch.arange(len(world))
    tokens = Column(name="tokens", dtype=torch.int64)
    generate = CallShape(
        atom=groups,
        needs=("tokens",),
        returns=(tokens, Column(name="old_logprobs")),
        arrange=split_groups_if_few,
    )
    score = CallShape(
        atom=single, needs=("tokens", "mask"), returns=(tokens, Column(name="values"))
    )
    update = CallShape(
        atom=single,
        needs=("tokens", "mask", "old_logprobs", "advantages", "returns", "values"),
        arrange=into_minibatches(4, seed=0, step=0),
    )
    for calls in ([generate], [score] * 4, [update] * 2):
        simulate(meter, others, world, replicas, calls)
    table = torch.rand(size, 12, 3, dtype=torch.float64)
    table[..., 2] = 0
    name = "comparing ranks (rank 0; every fifth step, a fifth of it)"
    with meter.charge(name):
        find_straggler(table, [("update", str(i)) for i in range(12)], 10.0)
    meter.seconds[name] /= 5


def llama(num_layers: int) -> ModelConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    )


def start(meter: Meter, each: Meter, size: int, num_layers: int, *, with_sync: bool) -> None:
    """Groups, owners of slices, the messages of a sync, and (`each`) a checkpoint's index."""
    seat = {"device_type": "cuda", "local_size": NODE, "gpu_bytes": 80 * 10**9}
    with meter.charge("seats of all ranks"):
        check_seats([Seat(local_rank=rank % NODE, **seat) for rank in range(size)])
    ranks = list(range(size))
    degrees = {"tp": TP, "dp_shard": SHARD, "dp_replicate": size // TP // SHARD}
    engine = {"tp": TP, "dp_replicate": size // TP}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    groups = ProcessGroups()
    with meter.charge("meshes and groups"):
        Mesh("policy", ranks, degrees, "cpu", groups)
        Mesh("rollout", ranks, engine, "cpu", groups)
    model = llama(num_layers)
    layout = model_layout(model, ranks, degrees, torch.float32)
    with meter.charge("owners of a checkpoint's slices"):
        owned = owned_slices(layout, 0)
        frozen_slices(layout[0])
    checkpoint(each, layout[0], owned, size)
    if with_sync:
        target = model_layout(model, ranks, engine, torch.bfloat16)
        plan = plan_sync(layout, target, node_size=NODE)
        with meter.charge("messages of a sync"):
            rank_rounds(plan, plan.rounds, 0)


def checkpoint(meter: Meter, table: Mapping[str, Any], owned: Set[Any], size: int) -> None:
    """This rank's entries, and on rank 0 the index of all."""
    held = {}
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        for name, shard in table.items():
            tensor = torch.empty(shard.shape, device="meta")
            held[f"{group}/{name}"] = (tensor, shard.slices)
    with meter.charge("entries of this rank's slices"):
        entries, _ = entries_of(only(held, owned), "rank_00000.safetensors")
    every = [entry for _ in range(size) for entry in entries]
    with meter.charge("index of all ranks' slices (rank 0)"):
        num_bytes = sum(len(part) for part in index_text(1, "{}", {}, every))
    meter.count("index of all ranks' slices (rank 0)", num_bytes)


def show(title: str, meters: Mapping[int, Meter]) -> None:
    print(f"| {title} | " + " | ".join(f"{size} ranks" for size in meters) + " |")
    print("|---|" + "---|" * len(meters))
    first = next(iter(meters.values()))
    for name in first.seconds:
        cells = []
        for meter in meters.values():
            text = f"{meter.seconds[name] * 1000:.1f} ms"
            if name in meter.num_bytes:
                text += f", {meter.num_bytes[name] / 1e6:.2f} MB"
            cells.append(text)
        print(f"| {name} | " + " | ".join(cells) + " |")
    sums = [f"{sum(meter.seconds.values()) * 1000:.0f} ms" for meter in meters.values()]
    print("| together | " + " | ".join(sums) + " |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--no-sync", action="store_true", help="no messages of a sync")
    given = parser.parse_args()
    torch.set_num_threads(1)
    starts, steps, checkpoints = {}, {}, {}
    for size in given.ranks:
        starts[size], checkpoints[size] = Meter(), Meter()
        start(starts[size], checkpoints[size], size, given.layers, with_sync=not given.no_sync)
        # the least of some: other processes may use the cores
        found = [Meter() for _ in range(REPEATS)]
        for meter in found:
            step(meter, size)
        steps[size] = found[0]
        for name in found[0].seconds:
            steps[size].seconds[name] = min(meter.seconds[name] for meter in found)
        dist.destroy_process_group()
    show("start", starts)
    show("step", steps)
    show("each checkpoint", checkpoints)


if __name__ == "__main__":
    main()
