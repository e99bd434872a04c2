"""Forecasts of layers of several kinds: windows, states, shared experts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from forecast_cases import config_of
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.sharding import global_shapes
from spmdrl.models.specs import AttentionOptions, GatedDelta
from spmdrl.planning.forecast.mixers import MixerShape
from spmdrl.planning.forecast.rollout_work import RolloutRank, Segment, decode_work
from spmdrl.planning.forecast.shapes import rank_shapes
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.kv_cache import block_tokens, cache_sizes
from spmdrl.rollout.native.varlen import BLOCK_MULTIPLE
from tiny_model import make_tiny_model

DEGREES = {"tp": 1, "ep": 1, "pp": 1, "cp": 1}


def hybrid(*kinds: str, **changes: Any) -> ModelConfig:
    return parse_config(
        {
            "architectures": ["Qwen3NextForCausalLM"],
            "vocab_size": 264,
            "hidden_size": 64,
            "num_hidden_layers": len(kinds),
            "layer_types": list(kinds),
            "intermediate_size": 96,
            "mlp_only_layers": [0],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "max_position_embeddings": 4096,
            **changes,
        }
    )


def windowed(model: ModelConfig, window: int, layers: int) -> ModelConfig:
    """The model with a window in its first layers."""
    [plain] = {spec.mixer for spec in model.layers}
    assert not isinstance(plain, GatedDelta)
    options = replace(plain.options, window=window)
    mixer = replace(plain, options=options)
    changed = [replace(spec, mixer=mixer) for spec in model.layers[:layers]]
    return replace(model, layers=(*changed, *model.layers[layers:]))


@pytest.mark.parametrize("window", [1, 3, 7, 8, 20, None])
def test_a_window_bounds_the_pairs_of_rows(window: int | None) -> None:
    length, rows = 7, 5
    mixer = MixerShape(matrices=0, inputs=0, operands=0, window=window)
    counted = rows * sum(min(i + 1, window or length) for i in range(length))
    pairs = rows * length * (length + 1) / 2
    assert mixer.seen(rows * length, pairs) == pytest.approx(counted)
    assert mixer.seen(0, 0) == 0


@pytest.mark.parametrize("tp", [1, 2])
def test_matrices_of_layers_of_all_kinds_are_counted(tp: int) -> None:
    model = hybrid("linear_attention", "full_attention", "linear_attention")
    shapes = rank_shapes(model, {**DEGREES, "tp": tp, "ep": tp})
    without = (".norm.", "_norm.", "layernorm", "A_log", "dt_bias", "model.norm")
    every = {n: math.prod(s) for n, s in global_shapes(model).items()}
    held = sum(size for name, size in every.items() if not any(part in name for part in without))
    # on every rank: the routers and the gates of shared experts
    copied = sum(
        n for name, n in every.items() if name.endswith(("mlp.gate.weight", "rt_gate.weight"))
    )
    assert shapes.held == pytest.approx((held - copied) / tp + copied)
    assert shapes.last * tp == 96 * 64 and shapes.expert_layers == 2


def rollout_of(model: ModelConfig) -> RolloutRank:
    config = config_of("grpo", {"policy": {}, "rollout": {}}, sampling={"max_tokens": 64})
    models = dict.fromkeys(config.roles, model)
    plan = plan_from_shapes(
        config, 1, 1, device_type="cuda", device_bytes=80 * 10**9, models=models
    )
    spec = plan.specs["rollout"]
    shapes = rank_shapes(model, spec.placement.degrees)
    return RolloutRank(spec=spec, shapes=shapes, captures=True, node_size=1)


def growth(model: ModelConfig, context: int) -> float:
    """Bytes that a decode step of 8 rows reads more with one more token of each."""
    rank = rollout_of(model)
    short, long = (
        decode_work(rank, Segment(steps=1, rows=8, context=context + more)) for more in (0, 1)
    )
    return long.memory_bytes - short.memory_bytes


def test_decoding_reads_what_its_layers_keep(tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    each = 8 * 2 * 2 * 8 * 2  # rows, keys and values, heads, dims, bytes
    assert growth(plain, 100) == 2 * each
    assert growth(windowed(plain, 50, layers=1), 100) == each
    assert growth(windowed(plain, 50, layers=1), 40) == 2 * each
    mixed = hybrid("linear_attention", "full_attention")
    assert growth(mixed, 100) == 8 * 2 * 2 * 16 * 2
    recurrent = hybrid("linear_attention", "linear_attention")
    assert growth(recurrent, 100) == 0
    states = rollout_of(recurrent).shapes.total(lambda mixer: mixer.state)
    assert states == 2 * (4 * 16 * 8 + (2 * 2 * 16 + 4 * 8) * 3)


def test_a_model_without_attention_has_a_plan_and_no_blocks() -> None:
    model = hybrid("linear_attention", "linear_attention")
    spec = rollout_of(model).spec
    config = config_of("grpo", {"policy": {}, "rollout": {}}, sampling={"max_tokens": 64})
    sizes = cache_sizes(config, spec)
    assert sizes.block == 1 and sizes.step > 2 * 4 * 4 * 16 * 8


def test_blocks_are_pages_where_the_engine_reads_pages(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    config = config_of("grpo", {"policy": {}, "rollout": {}}, rollout={"block_size": 16})
    spec = rollout_of(model).spec
    assert spec.dtype == torch.bfloat16
    assert block_tokens(config, spec) == BLOCK_MULTIPLE
    [plain] = {layer.mixer for layer in model.layers}
    assert not isinstance(plain, GatedDelta)
    capped = replace(plain, options=AttentionOptions(scale=plain.options.scale, softcap=50.0))
    layers = tuple(replace(layer, mixer=capped) for layer in model.layers)
    assert block_tokens(config, replace(spec, model=replace(model, layers=layers))) == 16
