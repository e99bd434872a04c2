"""Bytes that a decode step reads: the rank's weights and its rows' keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forecast_cases import config_of
from spmdrl.planning.forecast.rollout_work import RolloutRank, Segment, decode_work, read_bytes
from spmdrl.planning.forecast.shapes import rank_shapes
from spmdrl.planning.from_shapes import plan_from_shapes
from spmdrl.planning.parts import cache_bytes
from tiny_model import make_tiny_model


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_step_reads_the_weights_and_the_cache(tmp_path: Path, architecture: str, tp: int) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": False, "num_experts": 4}
    changes["max_position_embeddings"] = 4096
    model = make_tiny_model(tmp_path / "model", architecture, **changes)
    config = config_of(
        "grpo", {"policy": {"tp": tp}, "rollout": {"tp": tp}}, sampling={"max_tokens": 64}
    )
    models = dict.fromkeys(config.roles, model)
    plan = plan_from_shapes(
        config, 2, 2, device_type="cuda", device_bytes=80 * 10**9, models=models
    )
    spec, table = plan.specs["rollout"], plan.layouts["rollout"][0]
    shapes = rank_shapes(spec.model, spec.placement.degrees)
    rank = RolloutRank(spec=spec, shapes=shapes, captures=True, node_size=2)
    every = 10_000.0  # rows enough for every expert
    matrices = {
        name: held.num_bytes
        for name, held in table.items()
        if "norm" not in name and name not in ("embed_tokens.weight", "head.weight")
    }
    assert read_bytes(rank, every) == pytest.approx(sum(matrices.values()))
    assert read_bytes(rank, 1) <= read_bytes(rank, every)
    assert shapes.held * spec.dtype.itemsize == pytest.approx(
        sum(held.num_bytes for name, held in table.items() if "norm" not in name)
    )
    short, long = (
        decode_work(rank, Segment(steps=1, rows=8, context=context)) for context in (100, 101)
    )
    rows, tokens = 8, config.data.train.max_tokens + config.sampling.max_tokens
    samples = config.data.prompts_per_step * config.data.group_size // (2 // tp)
    cache = cache_bytes(config, spec) / (min(samples, config.rollout.max_running))
    per_token = long.memory_bytes - short.memory_bytes
    assert cache / (per_token / rows) == pytest.approx(tokens, rel=0.25)  # in whole blocks of 256
    kv_heads = max(1, model.attention.num_kv_heads // tp)
    assert per_token == rows * 2 * model.num_layers * kv_heads * model.attention.head_dim * 2
