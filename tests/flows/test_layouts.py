"""The same configuration on 1, 2 and 4 ranks in every layout: same tokens, losses, gradients."""

from __future__ import annotations

import pytest

from flow_cases import run_layouts
from replay import assert_same_samples
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

LAYOUTS = {
    1: {"one": []},
    2: {
        "dp2": [],
        "shard2": ["roles.policy.dp_shard=2"],
        "tp2": ["roles.policy.tp=2", "roles.rollout.tp=2", "roles.reference.tp=2"],
        "shard2, rollout tp2": ["roles.policy.dp_shard=2", "roles.rollout.tp=2"],
        "cp2": ["roles.policy.cp=2", "roles.reference.cp=2"],
    },
    4: {
        "dp2 x tp2": ["roles.policy.tp=2", "roles.rollout.tp=2", "roles.reference.tp=2"],
        "shard2 x tp2, rollout dp4": ["roles.policy.tp=2", "roles.policy.dp_shard=2"],
        "dp4": [],
        "cp2 x shard2": ["roles.policy.cp=2", "roles.policy.dp_shard=2"],
        "disjoint": ["roles.policy.ranks=0-1", "roles.reference.ranks=2-3"],
    },
}
SETTINGS = {
    "environment": "replay:ReplayEnvironment",
    "roles": {"policy": {}, "reference": {}, "rollout": {}},
    "algorithm": {"kl_coef": 0.1, "importance_cap": 2.0},
    "train": {"lr": 1e-3, "microbatch_tokens": 300, "num_minibatches": 2},
}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Layout name -> metrics of three steps, and the directory of the recorded rows."""
    root = tmp_path_factory.mktemp("layouts")
    make_tiny_model(root / "model")
    return run_layouts(root, only(LAYOUTS, asked(request, "name")), **SETTINGS), root


LINED_UP = ("shard2", "shard2, rollout tp2")
# every axis, and engines of other layouts than the policy's
BRIEF = (*LINED_UP, "cp2", "disjoint")
LAYOUT_NAMES = swept([n for size, own in LAYOUTS.items() if size > 1 for n in own], BRIEF)


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_losses_and_gradient_norms_equal_one_rank(runs, name):
    one, other = runs[0]["one"], runs[0][name]
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in ("loss", "grad_norm", "ref_kl", "entropy", "reward"):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step
    assert one[0]["grad_norm"] > 0
    assert one[2]["ref_kl"] > 1e-4, "the policy has not moved away from the reference"


@pytest.mark.parametrize("name", LINED_UP)
def test_shards_that_line_up_with_the_engine_move_nothing(runs, name):
    """Of the cases of two ranks with shards, one where the engine's tp is not dp_shard beside."""
    moved = [step.get("sync/gb", 0.0) for step in runs[0][name]]
    assert min(moved) > 0 if name == "shard2" else moved == [0.0] * 3


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_first_step_samples_equal_one_rank(runs, name):
    assert_same_samples(runs[1], name)
