"""Faults planted into the product, each of which the stand-in CUDA must name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from spmdrl.rollout.native.runner import Runner
from spmdrl.training import torch_backend
from spmdrl.world import World
from tiny_model import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from test_gpu import SHAPE, answers, needs_graphs

pytestmark = pytest.mark.fakegpu


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "model"
    make_tiny_model(path, **SHAPE)
    return path


def waiting_in_a_capture(world: World, model: str) -> None:
    plain = Runner._compute

    def compute(self: Runner, *arguments: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return plain(self, *arguments)

    Runner._compute = compute  # type: ignore[method-assign]
    answers(world, model, "bfloat16", True)


@needs_graphs
def test_a_synchronisation_in_a_captured_step_is_named(model: Path) -> None:
    with pytest.raises(AssertionError, match="during the capture of a graph"):
        run_ranks(waiting_in_a_capture, 1, str(model), device="cuda", timeout_s=600)


def skipping_a_collective(world: World) -> None:
    """The gradients of two replicas are summed on one of them only."""
    os.environ["FAKE_GPU_NCCL_TIMEOUT"] = "20"
    gradients = [torch.ones(4, device=world.device)]
    if world.rank == 0:
        torch_backend.all_reduce_gradients(gradients, dist.group.WORLD)
    dist.barrier(device_ids=[world.device.index])


def test_a_rank_that_skips_a_collective_is_named() -> None:
    with pytest.raises(AssertionError, match="rank"):
        run_ranks(skipping_a_collective, 2, device="cuda", timeout_s=600)
