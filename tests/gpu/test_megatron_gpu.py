"""Megatron on CUDA: an optimizer step with fused AdamW. Needs one GPU and megatron-core."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.planning.systems.megatron import import_backend
from spmdrl.training.megatron.checks import MegatronOptions
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.megatron,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]


def updates(world: World, kind: str, dtype: torch.dtype) -> list[tuple[float, float, Tensor]]:
    """Loss, norm and the log-probabilities afterwards, of two updates; the first clips."""
    mesh, model = Mesh("policy", [0], {}, "cuda"), tiny_config(head_dim=16)
    given = options(param_dtype=dtype, clip_norm=5.0)
    common = mesh, model, LivelyCheckpoint(model), given, world.device
    backend = (
        TorchBackend(*common) if kind == "torch" else import_backend()(*common, MegatronOptions())
    )
    rows = make_rows([5, 9], 2, seconds=True)
    found = []
    for _ in range(2):
        sums = backend.forward_backward(rows, loss_fn, next_token(), normaliser=20.0)
        done = backend.optim_step()
        assert not done.skipped
        read = backend.forward(rows, next_token())["logprobs"]
        found.append((sums["loss"], done.grad_norm, read))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_updates_equal_those_of_the_torch_backend(dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    arguments = {"device": "cuda", "timeout_s": 200}
    plain = run_ranks(updates, 1, "torch", dtype, **arguments)[0]
    found = run_ranks(updates, 1, "megatron", dtype, **arguments)[0]
    for (loss, norm, read), (wanted_loss, wanted_norm, wanted) in zip(found, plain, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=tolerance)
        assert norm == pytest.approx(wanted_norm, rel=tolerance)
        torch.testing.assert_close(read, wanted, rtol=tolerance, atol=tolerance)
