"""FSDP2 asks NCCL for plain sums, over one communicator for all that have the same ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fakegpu

STEP = """
import torch
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options, tiny_config
from spmdrl.distributed.groups import ProcessGroups
from spmdrl.distributed.mesh import Mesh
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import start_world, stop_world

world = start_world(device="cuda")
torch.backends.cuda.enable_cudnn_sdp(False)
groups, model = ProcessGroups(), tiny_config(head_dim=16)
for role in ("policy", "value"):
    mesh = Mesh(role, range(world.size), {"dp_shard": 2}, "cuda", groups)
    given = options(param_dtype=torch.bfloat16)
    backend = TorchBackend(mesh, model, LivelyCheckpoint(model), given, world.device)
    backend.forward_backward(make_rows([5], 2, seconds=True), loss_fn, next_token(), normaliser=9.0)
    backend.optim_step()
stop_world()
"""


def test_shards_are_summed_over_one_communicator(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(Path(__file__).parents[1] / name) for name in ("training", ".")]
    shared = {
        **os.environ,
        "FAKE_GPU_TRACE": str(tmp_path / "trace"),
        "PYTHONPATH": os.pathsep.join([*paths, os.environ["PYTHONPATH"]]),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STEP],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=500)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    traces = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert len(traces) == 2
    for trace in traces:
        assert trace.count("CommInit") == 1
        sums = [line for line in trace.splitlines() if "ReduceScatter" in line]
        assert len(sums) > 4 and all("float32, sum" in line for line in sums), sums
