"""Training on CUDA: the optimizer's step without a wait, memory that is free. Needs one GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.host_copies import to_device
from spmdrl.training.optimizer import HostNumber, gradient_norm, prepare_step
from spmdrl.training.readout import next_token
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import ALLOCATOR_VARIABLES, World, free_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_cases import LivelyCheckpoint, loss_fn, make_rows, options, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZES = (3, 70_000, 1)


def one_step(device: str, scale: float, clip_norm: float) -> tuple[float, float, list[Tensor]]:
    """The norm, AdamW's count of steps and the weights after a step by gradients times `scale`."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator).to(device).requires_grad_() for n in SIZES]
    adamw = torch.optim.AdamW(weights, lr=0.1, eps=1e-3, fused=True)
    for weight in weights:
        zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[weight] = {"step": torch.zeros((), device=device), **zeros}
    gradients = [torch.randn(n, generator=generator).mul(scale).to(device) for n in SIZES]
    norm = gradient_norm(gradients, [None], torch.device(device))
    number = HostNumber(norm)
    if prepare_step([adamw], gradients, norm, clip_norm):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        adamw.step()
    count = adamw.state[weights[0]]["step"].item()
    return number.value(), count, [weight.detach().cpu() for weight in weights]


@pytest.mark.parametrize(
    ("scale", "clip_norm", "steps"),
    [(1.0, 1e4, 1), (1.0, 0.5, 1), (1.0, math.inf, 1), (0.0, 1.0, 0), (math.nan, 1.0, 0)],
)
def test_a_step_clips_and_skips_like_the_cpus(scale: float, clip_norm: float, steps: int) -> None:
    norm, count, weights = one_step("cuda", scale, clip_norm)
    expected_norm, expected_count, expected = one_step("cpu", scale, clip_norm)
    assert norm == pytest.approx(expected_norm, rel=1e-7, nan_ok=True)
    assert count == expected_count == steps
    for found, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def update(world: World) -> int:
    """The number of tensors that an update changes; a wait for the device in its step raises."""
    mesh, model = Mesh("policy", [0], {}, "cuda"), tiny_config(head_dim=16)
    given = options(param_dtype=torch.bfloat16)
    backend = TorchBackend(mesh, model, LivelyCheckpoint(model), given, world.device)
    rows = make_rows([5, 9], 2, seconds=True)
    before = [leaf.weight.cpu() for leaf in backend._leaves]
    backend.forward_backward(rows, loss_fn, next_token(), normaliser=20.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # waits for an event only
    done = backend.optim_step()
    torch.cuda.set_sync_debug_mode("default")
    assert done.grad_norm > 0 and not done.skipped
    after = [leaf.weight.cpu() for leaf in backend._leaves]
    return sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_optimizer_step_does_not_wait_for_the_device() -> None:
    assert run_ranks(update, 1, device="cuda", timeout_s=200)[0] > 10


def test_tensors_of_all_dtypes_travel_together() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    sent = [
        torch.arange(7),
        torch.tensor([True, False, True]),
        torch.zeros(0, 3),
        torch.rand(5, 2, dtype=torch.float64).t(),
        torch.tensor(2.5),
    ]
    got = to_device(sent, device)
    for there, here in zip(got, sent, strict=True):
        assert there.device == device and there.dtype == here.dtype
        assert torch.equal(there.cpu(), here)
    assert len({tensor.untyped_storage().data_ptr() for tensor in got}) == 1
    version = got[0]._version
    got[3].mul_(2)
    assert got[0]._version == version


def test_free_memory_is_what_nobody_uses() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before, reserved, size = free_bytes(device), torch.cuda.memory_reserved(device), 256 << 20
    ballast = torch.empty(size, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) >= size
    del ballast
    torch.cuda.empty_cache()
    # what torch's cache still holds (torch 2.11's of segments that grow) is not free
    kept = torch.cuda.memory_reserved(device) - reserved
    assert free_bytes(device) >= before - kept
    assert free_bytes(torch.device("cpu")) == 0


SEGMENTS = """
import torch
from spmdrl.world import start_world, stop_world
start_world(device="cuda")
kept = torch.empty(1 << 22, device="cuda")
print({segment["is_expandable"] for segment in torch.cuda.memory_snapshot()})
stop_world()
"""


@pytest.mark.parametrize("variable", [None, *ALLOCATOR_VARIABLES])
def test_segments_grow_unless_the_user_says_how_they_are_made(variable: str | None) -> None:
    given = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    if variable is not None:
        given[variable] = "max_split_size_mb:512"
    answer = subprocess.run(
        [sys.executable, "-c", SEGMENTS], env=given, capture_output=True, text=True, check=False
    )
    # a container may lack NVML, which torch needs for it; then a line says so
    cannot = "memory segments have a fixed size: libnvidia-ml" in answer.stderr
    assert answer.stdout == f"{ {variable is None and not cannot} }\n", answer.stderr
    assert variable is None or not cannot
