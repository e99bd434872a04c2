"""`start_world` as a user's process sees it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from spmdrl.world import Seat, World, check_seats, start_world, stop_world, world_backend

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

ALONE = """
import torch, torch.distributed as dist
from spmdrl.world import start_world, stop_world
stop_world()
world = start_world(device="cpu")
total = torch.ones(1)
dist.all_reduce(total)
print(world.rank, world.size, world.local_size, world.device, world.is_first, world.node)
print(world.device_types)
stop_world()
print(int(total), dist.is_initialized(), torch.get_num_threads())
"""


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def test_a_world_of_one_needs_no_variables() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 1 1 cpu True 0", "('cpu',)", "1 False 1"]


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"RANK": "0"}, ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK"]),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
            ["MASTER_PORT"],
        ),
    ],
)
def test_incomplete_variables_are_named(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], missing: list[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun") as caught:
        start_world(device="cpu")
    assert str(missing) in str(caught.value)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device='tpu'.*auto, cpu or cuda"):
        start_world(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda, but torch finds no CUDA"):
            start_world(device="cuda")


def seats(*given: tuple[int, int]) -> list[Seat]:
    """Seats of (local rank, local size)."""
    return [Seat(device_type="cpu", local_rank=rank, local_size=size) for rank, size in given]


@pytest.mark.parametrize(
    "given",
    [
        [(0, 1)],
        [(0, 2), (1, 2)],
        [(0, 1), (0, 1)],
        [(0, 2), (1, 2), (0, 2), (1, 2)],
    ],
)
def test_nodes_of_equally_many_ranks_are_accepted(given: list[tuple[int, int]]) -> None:
    check_seats(seats(*given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([(0, 2), (1, 2), (0, 1)], "different numbers of ranks .*is 2 on rank 0, 1 on rank 2"),
        # dealt out to the nodes in turn, as srun does with --distribution=cyclic
        ([(0, 2), (0, 2), (1, 2), (1, 2)], "rank 1 of 4 has LOCAL_RANK=0 .*node by node"),
        # LOCAL_WORLD_SIZE was left out, so the whole world seemed to be one node
        ([(0, 4), (1, 4), (0, 4), (1, 4)], "rank 2 of 4 has LOCAL_RANK=0 and LOCAL_WORLD_SIZE=4"),
        ([(0, 2), (1, 2), (0, 2)], "rank 0 of 3 .*equally many"),
    ],
)
def test_ranks_that_a_local_size_cannot_describe_are_refused(
    given: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_seats(seats(*given))


@pytest.mark.parametrize(
    ("device_types", "backend"),
    [
        (("cuda", "cuda"), "cpu:gloo,cuda:nccl"),
        (("cpu", "cpu"), "gloo"),
        (("cuda", "cpu"), "gloo"),
    ],
)
def test_nccl_joins_where_all_ranks_have_cuda(device_types: tuple[str, ...], backend: str) -> None:
    assert world_backend(device_types) == backend


def start_again(world: World, port: int, local_sizes: list[int]) -> tuple[str, list[int]]:
    """A second world with ranks on nodes as given: what went wrong, or its nodes."""
    stop_world()
    local_size = local_sizes[world.rank]
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # rank 0 makes this one's store
    os.environ.update(
        MASTER_PORT=str(port),
        LOCAL_RANK=str(world.rank % local_size),
        LOCAL_WORLD_SIZE=str(local_size),
    )
    try:
        again = start_world(timeout_s=60, device="cpu")
    except ValueError as error:
        return str(error), []
    nodes = torch.zeros(again.size, dtype=torch.int64)
    nodes[again.rank] = again.node
    dist.all_reduce(nodes)
    assert again.device_types == ("cpu",) * again.size
    assert again.local_size == local_size
    return "", nodes.tolist()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_every_rank_knows_the_nodes_or_gets_the_same_error() -> None:
    fine = run_ranks(start_again, 4, free_port(), [2, 2, 2, 2])
    assert fine == [("", [0, 0, 1, 1])] * 4
    [first, *rest] = run_ranks(start_again, 3, free_port(), [2, 2, 1])
    assert "2 on rank 0, 1 on rank 2" in first[0]
    assert rest == [first, first]


LEFT_OVER = """
import resource, sys
import spmdrl.world as launch
launch.WAIT_S = 0.5
try:
    launch.start_world(timeout_s=3.0, device="cpu")
except Exception as error:
    print(type(error).__name__)
"""


def test_variables_that_are_left_over_are_named_while_it_waits() -> None:
    left = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OVER],
        env=environment(**left, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    [line] = [line for line in done.stderr.splitlines() if line.startswith("spmdrl: waits")]
    assert f"RANK=1 WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" in line
    assert line.endswith("env -u RANK -u WORLD_SIZE -u LOCAL_RANK -u MASTER_ADDR -u MASTER_PORT")


FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from spmdrl.commands.doctor import local_problems
from spmdrl.world import start_world, stop_world
world = start_world(device="cpu")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print(soft == hard, [text for text in local_problems(world) if "ulimit -Hn" in text])
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
print([text for text in local_problems(world) if "ulimit -Hn" in text])
stop_world()
"""


def test_a_rank_may_open_as_many_files_as_the_system_lets_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILES],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "True []"
    assert second == "['ulimit -Hn is 300, less than the 524 of 1 ranks']"
