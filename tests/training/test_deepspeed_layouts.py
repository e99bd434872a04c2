"""What DeepSpeed backends hold on two ranks is what plans say that they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_backends import WithAdded
from deepspeed_cases import Case, case, make_backend

from harness import run_ranks
from spmdrl.models.adapters import Adapter, find_targets, make_adapter
from spmdrl.models.config import ModelConfig, parse_config, tiny
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.models.local_shards import LocalTensors, Table
from spmdrl.models.sharding import global_shapes
from spmdrl.models.zero_layout import zero_layout, zero_state_layout
from spmdrl.training.deepspeed.backend import DeepspeedBackend
from spmdrl.world import World

pytestmark = pytest.mark.deepspeed

NARROW = {"param_dtype": torch.bfloat16}
DENSE, SINKS = "Qwen2ForCausalLM", "GptOssForCausalLM"
CASES: dict[str, tuple[str, Case, bool]] = {
    "1": (DENSE, case(1, dp_replicate=2), False),
    "1 narrow sinks": (SINKS, case(1, given=NARROW, dp_shard=2), False),
    "2 narrow": (DENSE, case(2, given=NARROW, dp_shard=2), False),
    "2 tp sinks": (SINKS, case(2, tp=2), False),
    "2 adapter": (DENSE, case(2, dp_shard=2), True),
    "3 narrow": (DENSE, case(3, given=NARROW, dp_shard=2), False),
    "3 sinks": (SINKS, case(3, dp_replicate=2), False),
    "3 adapter": (DENSE, case(3, dp_shard=2), True),
}


def model_of(architecture: str) -> ModelConfig:
    model_type = {DENSE: "qwen2", SINKS: "gpt_oss"}[architecture]
    given = {"architectures": [architecture], "model_type": model_type, "vocab_size": 98}
    return tiny(parse_config({**given, "hidden_size": 64}))


def adapter_of(model: ModelConfig) -> Adapter:
    return make_adapter(find_targets(model, ["attention"]), rank=3, alpha=6.0)


def shapes_of(held: LocalTensors) -> dict[str, Any]:
    return {name: (tuple(t.shape), t.dtype, slices) for name, (t, slices) in held.items()}


def planned(table: Table) -> dict[str, Any]:
    return {name: (held.shape, held.dtype, held.slices) for name, held in table.items()}


def held_as_planned(world: World, architecture: str, made: Case, adapts: bool) -> None:
    model = model_of(architecture)
    adapter = adapter_of(model) if adapts else None
    degrees, options, changes = made
    checkpoint: Any = RandomCheckpoint(model, 0) if adapter is None else WithAdded(model, adapter)
    backend: DeepspeedBackend = make_backend(
        world, model, made, checkpoint=checkpoint, adapter=adapter
    )
    place: dict[str, Any] = {
        "frozen": global_shapes(model) if adapts else (),
        "adapter": adapter,
        "only": [world.rank],
    }
    ranks, dtype = range(world.size), changes.get("param_dtype", torch.float32)
    weights = zero_layout(model, ranks, degrees, options.stage, dtype, **place)[world.rank]
    assert shapes_of(backend.local_tensors()) == planned(weights)
    states = zero_state_layout(model, ranks, degrees, options.stage, **place)[world.rank]
    found = backend.state_tensors()
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        own = {n.removeprefix(f"{kind}/"): t for n, t in found.items() if n.startswith(f"{kind}/")}
        assert shapes_of(own) == planned(states), kind
    trained = {name for name, held in states.items() if held.slices}
    assert trained


def on_two_ranks(world: World) -> list[str]:
    for name, made in CASES.items():
        try:
            held_as_planned(world, *made)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return list(CASES)


@pytest.mark.full
def test_backends_hold_what_plans_say() -> None:
    assert run_ranks(on_two_ranks, 2, timeout_s=280) == [list(CASES)] * 2
