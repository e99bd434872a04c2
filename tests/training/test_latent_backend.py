"""Latent attention on the train backend: layouts against one rank."""

from __future__ import annotations

from typing import Any

from backend_runs import compare, rows_of_step, run_layouts
from training_cases import tiny_config

from harness import run_ranks
from spmdrl.models.config import ModelConfig
from spmdrl.world import World

LAYOUTS: list[dict[str, int]] = [{"dp_shard": 2, "tp": 2}, {"cp": 2, "tp": 2}]


def latent_config() -> ModelConfig:
    return tiny_config(
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=2,
    )


def on_ranks(world: World) -> list[dict[str, Any]]:
    cases = [(degrees, {"lr": 1e-3}) for degrees in (LAYOUTS if world.size > 1 else [{}])]
    return run_layouts(world, latent_config(), cases, rows_of_step)


def test_layouts_train_as_one_rank_does() -> None:
    """Metrics, gradients, weights and moments of three steps."""
    [[one]] = run_ranks(on_ranks, 1)
    found = run_ranks(on_ranks, 4, timeout_s=200)
    for number, degrees in enumerate(LAYOUTS):
        print(degrees)
        compare([ranks[number] for ranks in found], one, latent_config())
