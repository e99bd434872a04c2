"""`start_world` as a user's process sees it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from spmdrl.launch import start_world

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

ALONE = """
import torch, torch.distributed as dist
from spmdrl.launch import start_world, stop_world
stop_world()
world = start_world(device="cpu")
total = torch.ones(1)
dist.all_reduce(total)
print(world.rank, world.size, world.local_size, world.device, world.is_first, world.node)
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
    assert done.stdout.splitlines() == ["0 1 1 cpu True 0", "1 False 1"]


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
