"""The harness itself: a test that cannot fail shows nothing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from spmdrl.world import World


def describe(world: World, factor: int) -> tuple[int, int, str, int]:
    total = torch.tensor([world.rank + 1])
    dist.all_reduce(total)
    return world.rank, int(total) * factor, world.device.type, torch.get_num_threads()


def fail_on_the_last(world: World) -> None:
    if world.rank == world.size - 1:
        raise KeyError("told to fail")
    dist.barrier()


def die_on_the_last(world: World) -> None:
    if world.rank == world.size - 1:
        sys.stdout.flush()
        os._exit(3)
    dist.barrier()


def sleep(world: World, pid_file: str) -> None:
    if world.rank == 0:
        Path(pid_file).write_text(str(os.getpid()))
    time.sleep(60)


def test_values_come_in_rank_order() -> None:
    assert run_ranks(describe, 3, 10) == [(rank, 60, "cpu", 1) for rank in range(3)]


def test_a_rank_that_raises_ends_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed:.*KeyError: 'told to fail'"):
        run_ranks(fail_on_the_last, 2)


def test_a_rank_that_dies_ends_the_test() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[1\] died|rank 0 failed"):
        run_ranks(die_on_the_last, 2)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_ends_the_test_and_is_gone(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(AssertionError, match=r"ranks \[0\] gave no answer in 3\.0 s"):
        run_ranks(sleep, 1, str(pid_file), timeout_s=3.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
