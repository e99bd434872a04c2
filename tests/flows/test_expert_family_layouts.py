"""GRPO on tiny models whose experts are stacked, have biases, or are chosen by groups with a
correction: shards of one layout train, and parts of another generate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow_cases import run_configs, write_config
from harness import run_ranks
from replay import assert_same_samples
from sweeps import swept
from tiny_model import make_tiny_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": (
        "GptOssForCausalLM",
        {"num_experts": 4, "intermediate_size": 16, "sliding_window": 16, "swiglu_limit": 1.0},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 16,
            "use_qk_norm": True,
        },
    ),
}
SHARDS_TP = ["roles.policy.dp_shard=2", "roles.policy.ep=2", "roles.rollout.tp=2"]
SHARDS_EP = ["roles.policy.dp_shard=2", "roles.rollout.tp=2", "roles.rollout.ep=2"]
TP = ["roles.policy.tp=2", "roles.rollout.tp=2", "roles.rollout.ep=2"]
LAYOUTS = {
    "gpt_oss": {"shards, tp generates": SHARDS_TP, "shards, ep generates": SHARDS_EP, "tp": TP},
    "glm4_moe": {"shards, ep generates": SHARDS_EP, "shards, tp generates": SHARDS_TP, "tp": TP},
}
SETTINGS: dict[str, Any] = {
    "environment": "replay:ReplayEnvironment",
    "steps": 2,
    "sampling": {"max_tokens": 6},
    # at larger rates AdamW amplifies the rounding of gradients that are nearly 0
    "train": {"lr": 1e-4, "microbatch_tokens": 300, "num_minibatches": 2, "recompute": "layer"},
}
COMPARED = ("loss", "grad_norm", "entropy", "reward", "expert_load", "experts_idle")


def compare(root: Path, name: str, layouts: dict[str, list[str]]) -> None:
    architecture, changes = MODELS[name]
    make_tiny_model(root / "model", architecture, **changes)
    configs = []
    for number, overrides in enumerate([[], *layouts.values()]):
        path = write_config(root / f"{number}.yaml", root / "model", root / f"{number}", **SETTINGS)
        configs.append((str(path), overrides))
    plain, *others = run_ranks(run_configs, 2, configs, str(root), timeout_s=400)[0]
    assert len(plain) == 2
    for number, (layout, run) in enumerate(zip(layouts, others, strict=True), start=1):
        assert_same_samples(root, str(number))
        for step, (a, b) in enumerate(zip(plain, run, strict=True)):
            for metric in COMPARED:
                where = (layout, step, metric)
                assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), where
            assert b["rollout_gap_max"] < 1e-4, (layout, step)


@pytest.mark.parametrize("name", swept(MODELS, ["gpt_oss"]))
def test_a_layout_trains_what_another_generates_with(name: str, tmp_path: Path) -> None:
    first = next(iter(LAYOUTS[name]))
    compare(tmp_path, name, {first: LAYOUTS[name][first]})


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_trains_what_another_generates_with(name: str, tmp_path: Path) -> None:
    compare(tmp_path, name, LAYOUTS[name])
