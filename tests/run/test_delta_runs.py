"""GRPO on Qwen3-Next with experts: layouts of two ranks, samples drawn ahead, and stops while
samples with recurrent states are generated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_exact_resume import check

from flow_cases import run_layouts
from replay import assert_same_samples
from tiny_model import make_tiny_model

pytestmark = pytest.mark.full

MODEL: dict[str, Any] = {
    # a row's first outputs are near 0, and norms of them would amplify rounding
    "rms_norm_eps": 1e-3,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "partial_rotary_factor": 0.5,
}
APART = ["roles.policy.dp_shard=2", "roles.rollout.tp=2"]
LAYOUTS = {
    1: {"one": []},
    2: {"shard2 to tp2": APART, "ep2 to dp2": ["roles.policy.dp_shard=2", "roles.policy.ep=2"]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("delta")
    make_tiny_model(root / "model", "Qwen3NextForCausalLM", **MODEL)
    return root


def test_layouts_that_differ_between_trainer_and_engine_equal_one_rank(root: Path) -> None:
    """Engines sample from synced weights what the trainer computes, also after updates."""
    runs = run_layouts(root, LAYOUTS, environment="replay:ReplayEnvironment")
    one = runs["one"]
    for name in LAYOUTS[2]:
        assert len(runs[name]) == len(one) == 3
        for found, wanted in zip(runs[name], one, strict=True):
            for metric in ("loss", "grad_norm", "entropy", "reward"):
                expected = pytest.approx(wanted[metric], rel=1e-3, abs=1e-6)
                assert found[metric] == expected, (name, metric)
            assert found["grad_norm"] > 0 and found["rollout_gap_max"] < 1e-4
        assert_same_samples(root, name)


def test_runs_stopped_while_samples_are_drawn_ahead_resume_bit_for_bit(root: Path) -> None:
    words = ["lag=1", "algorithm.importance_cap=2.0", *APART]
    saved = check(root, "ahead", 2, ["4 100", "9 100", "18 100"], words)
    assert all("+" in name for name in saved[:2]), "stopped within a step"
