"""The plan's bytes of an update under ZeRO against what operations allocate in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_activation_bytes import TOKENS, Float32Products, model_of, rows, total

from allocations import Allocations
from harness import run_ranks
from spmdrl.config.roles import RoleSection
from spmdrl.config.training import TrainSection
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.placement import Placement
from spmdrl.planning.activation_bytes import working_bytes
from spmdrl.planning.parts import table_bytes
from spmdrl.planning.systems.registry import train_system
from spmdrl.role_spec import RoleSpec
from spmdrl.training.options import TrainOptions
from spmdrl.training.readout import next_token
from spmdrl.world import World

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow, pytest.mark.full]

MODEL = model_of("one")
DEGREES = {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "ep": 1}
CASES = [
    (stage, offload, dtype)
    for stage, offload in (*((stage, "none") for stage in (1, 2, 3)), (1, "optimizer"))
    + ((2, "optimizer"), (3, "optimizer"), (3, "all"))
    for dtype in (torch.float32, torch.bfloat16)
]
"""Device and host are one memory here."""


def spec_of(stage: int, offload: str, dtype: torch.dtype) -> RoleSpec:
    zero = {"stage": stage, "offload": offload}
    train = {"backend": "deepspeed", "recompute": "layer", "microbatch_tokens": TOKENS // 2}
    return RoleSpec(
        name="policy",
        kind="policy",
        section=RoleSection(),
        train=TrainSection.model_validate({**train, "deepspeed": zero}),
        placement=Placement(ranks=(0, 1), degrees=DEGREES),
        path=Path("model"),
        model=MODEL,
        device_type="cpu",
        dtype=dtype,
        trained=True,
        backend="deepspeed",
        is_tiny=False,
    )


def measure(world: World, stage: int, offload: str, dtype: torch.dtype) -> int:
    """Peak bytes of a step of two microbatches, with weights and the optimizer's state."""
    spec = spec_of(stage, offload, dtype)
    mesh = Mesh("policy", (0, 1), DEGREES, "cpu")
    options = TrainOptions(**spec.train.model_dump(), param_dtype=dtype)
    with Float32Products(), Allocations() as every:
        checkpoint = RandomCheckpoint(MODEL, 0)
        backend = train_system(spec).make(spec, mesh, checkpoint, options, world.device, None)
        for _ in range(2):
            every.peak = 0  # what the making of an engine needs is not asked
            backend.forward_backward(rows(), total, next_token(), normaliser=1.0)
            backend.optim_step()
    return every.peak


def measured(world: World) -> list[int]:
    return [measure(world, *case) for case in CASES]


def test_the_estimate_is_a_close_upper_bound() -> None:
    by_rank = run_ranks(measured, 2, timeout_s=1200)
    for number, (stage, offload, dtype) in enumerate(CASES):
        spec = spec_of(stage, offload, dtype)
        system = train_system(spec)
        layout = system.layout(spec)
        held = system.memory(spec, layout[0], system.state_layout(spec, layout)[0])
        estimate = working_bytes(spec, TOKENS // 2, backward=True)
        estimate += held.gradients + held.passes + held.optimizer + table_bytes(layout[0])
        estimate += held.host
        for peak in (rank[number] for rank in by_rank):
            assert 0.75 * estimate < peak < estimate, (stage, offload, dtype, peak, estimate)
