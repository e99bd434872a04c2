"""Collectives of the stand-in NCCL: values, replays, and the ranks that skip or differ."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fake_gpu.races import watching_races
from harness import run_ranks
from spmdrl.world import World

pytestmark = pytest.mark.fakegpu


def row(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


def collectives(world: World) -> dict[str, Any]:
    mine, found = world.rank + 1.0, {}

    def take(name: str, tensor: Tensor) -> None:
        found[name] = tensor.tolist()

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        x = row(mine, 10 * mine, dtype=dtype)
        dist.all_reduce(x)
        take(f"sum of {dtype}", x)
    x = row(mine)
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    take("mean", x)
    x = row(mine)
    dist.all_reduce(x, op=dist._make_nccl_premul_sum(0.5))
    take("scaled sum", x)
    whole = torch.zeros(2, device="cuda")
    dist.all_gather_into_tensor(whole, row(mine))
    take("gathered", whole)
    part = torch.zeros(1, device="cuda")
    dist.reduce_scatter_tensor(part, row(mine, 10 * mine))
    take("scattered", part)
    x = row(mine)
    dist.broadcast(x, 1)
    take("broadcast", x)
    sizes = [1, 2] if world.rank == 0 else [2, 1]  # rank 0 keeps one of three
    got = torch.zeros(sum(sizes), device="cuda")
    dist.all_to_all_single(got, row(mine, 2 * mine, 3 * mine), sizes, sizes)
    take("exchanged", got)
    alone = [dist.new_group([rank]) for rank in range(2)][world.rank]
    x = row(mine)
    dist.all_reduce(x, group=alone)
    take("alone", x)
    return found


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_values() -> None:
    first, second = run_ranks(collectives, 2, device="cuda", timeout_s=600)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        assert first[f"sum of {dtype}"] == [3, 30]
    assert first["mean"] == [1.5] and first["scaled sum"] == [1.5]
    assert first["gathered"] == [1, 2] and first["broadcast"] == [2]
    assert (first["scattered"], second["scattered"]) == ([3], [30])
    assert (first["exchanged"], second["exchanged"]) == ([1, 2, 4], [2, 3, 6])
    assert (first["alone"], second["alone"]) == ([1], [2])


def replays(world: World) -> list[float]:
    """A graph's collective sums anew what each replay brings."""
    dist.all_reduce(row(0))  # the communicator exists before the capture
    total = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += world.rank + 1
        dist.all_reduce(total)
        twice = total * 2
    found = []
    for _ in range(2):
        graph.replay()
        found.append(twice.item())
    return found


def test_a_replay_runs_its_collectives() -> None:
    assert run_ranks(replays, 2, device="cuda", timeout_s=600) == [[6, 18]] * 2


def message_of(call: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def faults(world: World) -> dict[str, str]:
    found = {}
    x, short = row(1, 2), row(1)
    dist.all_reduce(x)
    found["another"] = message_of(
        lambda: dist.all_reduce(x) if world.rank == 0 else dist.broadcast(x, 0)
    )
    found["size"] = message_of(lambda: dist.all_reduce(x if world.rank == 0 else short))
    os.environ["FAKE_GPU_NCCL_TIMEOUT"] = "1"
    if world.rank == 0:
        found["skipped"] = message_of(lambda: dist.all_reduce(x))
    dist.barrier(group=dist.new_group(backend="gloo"))
    return found


def test_a_rank_that_skips_or_differs_is_named() -> None:
    first, second = run_ranks(faults, 2, device="cuda", timeout_s=600)
    assert "AllReduce of 2 float32, sum" in first["another"]
    assert "but rank 1 issues: Broadcast of 2 float32, root 0" in first["another"]
    assert "but rank 0 issues: AllReduce of 2 float32, sum" in second["another"]
    assert "but rank 0 issues: AllReduce of 2 float32" in second["size"]
    assert "rank 1 did not come in 1 s: AllReduce of 2 float32" in first["skipped"]


def races(world: World) -> tuple[str, list[float]]:
    x = row(1, 2)
    dist.all_reduce(x)
    with watching_races():
        work = dist.all_reduce(x, async_op=True)
        message = message_of(lambda: x + 1)
        work.wait()
        return message, (x + 1).tolist()


def test_a_result_that_is_not_waited_for_is_named() -> None:
    for message, values in run_ranks(races, 2, device="cuda", timeout_s=600):
        assert "reads memory that AllReduce of 2 float32" in message
        assert values == [5, 9]
