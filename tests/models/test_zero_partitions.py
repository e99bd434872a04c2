"""The partitions of real DeepSpeed engines on two ranks, against `models/zero_layout.py`."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness import run_ranks
from spmdrl.models.config import ModelConfig, parse_config, tiny
from spmdrl.models.decoder import Decoder
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.models.zero_layout import (
    Stage,
    optimizer_groups,
    partition_range,
    partition_sizes,
    shard_ranges,
    zero_parameters,
)
from spmdrl.world import World
from tiny_model import load_into

pytestmark = pytest.mark.deepspeed


def imported() -> Any:
    """deepspeed on CPUs, without its kernels, which would be compiled."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
        deepspeed.logger.setLevel("ERROR")
        deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def odd_model() -> ModelConfig:
    """A model whose flat buffers and matrices two ranks do not divide into whole rows."""
    given = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 97}
    return tiny(parse_config({**given, "hidden_size": 64}))


def flats(optimizer: Any, stage: Stage) -> list[Tensor]:
    """The float32 partitions of an engine's groups."""
    if stage == 3:
        found = optimizer.fp32_partitioned_groups_flat
    elif "single_partition_of_fp32_groups" in vars(optimizer):
        found = optimizer.single_partition_of_fp32_groups
    else:
        found = optimizer.fp32_groups_flat_partition  # ZeRO 1 in bfloat16
    return [flat.detach() for flat in found]


def one_engine(world: World, deepspeed: Any, stage: Stage, dtype: torch.dtype) -> str:
    model = odd_model()
    decoder = Decoder(model, dtype=dtype, device="cpu")
    load_into(decoder, RandomCheckpoint(model, 0))
    frozen = {"model.layers.0.self_attn.o_proj.weight"}
    parameters = zero_parameters(model, frozen=frozen)
    by_name: dict[str, nn.Parameter] = dict(decoder.named_parameters())
    values = {name: p.detach().clone().flatten() for name, p in by_name.items()}
    for p in parameters:
        by_name[p.name].requires_grad_(p.trained)
    groups = [
        {"params": [by_name[p.name] for p in group], "weight_decay": 0.1 * group[0].decay}
        for group in optimizer_groups(parameters)
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype is torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adamw = torch.optim.AdamW(groups)
        engine = deepspeed.initialize(model=decoder, optimizer=adamw, config=config)[0]
    held = flats(engine.optimizer, stage)
    assert tuple(map(len, held)) == partition_sizes(parameters, stage, world.size)
    for name, at in shard_ranges(parameters, stage, world.rank, world.size).items():
        flat = held[at.group][at.offset : at.offset + at.stop - at.start]
        assert torch.equal(flat, values[name][at.start : at.stop].float()), name
    for name, parameter in by_name.items():
        if stage == 3:
            start, stop = partition_range(len(values[name]), world.rank, world.size)
            part: Tensor = vars(parameter)["ds_tensor"]
            assert part.dtype is dtype
            assert torch.equal(part[: stop - start], values[name][start:stop]), name
        else:
            assert torch.equal(parameter.detach().flatten(), values[name]), name
    return type(engine.optimizer).__name__


def engines(world: World) -> list[str]:
    deepspeed = imported()
    stages: tuple[Stage, ...] = (1, 2, 3)
    kinds = [(stage, dtype) for stage in stages for dtype in (torch.float32, torch.bfloat16)]
    return [one_engine(world, deepspeed, *kind) for kind in kinds]


def test_real_engines_hold_what_the_layout_says() -> None:
    plain, whole = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"
    expected = [plain, "BF16_Optimizer", plain, plain, whole, whole]
    assert run_ranks(engines, 2) == [expected, expected]
