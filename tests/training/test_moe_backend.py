"""A mixture of experts on the train backend: expert-parallel layouts against one rank."""

from __future__ import annotations

from typing import Any

import pytest
from test_torch_backend import compare, run_layouts
from training_cases import tiny_config

from harness import run_ranks
from spmdrl.launch import World
from spmdrl.models.config import ModelConfig

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def moe_config(**changes: Any) -> ModelConfig:
    return tiny_config("Qwen3MoeForCausalLM", **EXPERTS, norm_topk_prob=True, **changes)


Case = tuple[dict[str, int], dict[str, Any]]
TWO: list[Case] = [
    ({"dp_replicate": 2, "ep": 2}, {"microbatch_tokens": 30}),
    ({"dp_shard": 2, "ep": 2}, {"recompute": "layer", "microbatch_tokens": 40}),
    ({"cp": 2, "ep": 2}, {"recompute": "layer"}),
    ({"tp": 2, "ep": 2}, {"recompute": "layer"}),
    ({"tp": 2}, {}),
    ({"dp_shard": 2}, {}),
]
FOUR: list[Case] = [
    ({"dp_replicate": 2, "tp": 2, "ep": 2}, {}),
    ({"dp_shard": 2, "tp": 2, "ep": 4}, {"recompute": "layer"}),
    ({"dp_shard": 4, "ep": 2}, {"recompute": "layer", "microbatch_tokens": 30}),
    ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, {}),
    ({"dp_shard": 2, "cp": 2, "ep": 4}, {}),
]


def on_ranks(world: World, config: ModelConfig, cases: list[Case]) -> list[dict[str, Any]]:
    return run_layouts(world, config, cases)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(on_ranks, 1, moe_config(), [({}, {"microbatch_tokens": 100})])[0][0]


@pytest.mark.parametrize("cases", [TWO, FOUR], ids=["two", "four"])
def test_layouts_train_as_one_rank_does(one: dict[str, Any], cases: list[Case]) -> None:
    config, size = moe_config(), 2 if cases is TWO else 4
    results = run_ranks(on_ranks, size, config, cases, timeout_s=200)
    for number, (degrees, _) in enumerate(cases):
        print(degrees)
        compare([result[number] for result in results], one, config)
