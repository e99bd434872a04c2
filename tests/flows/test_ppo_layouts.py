"""PPO's four roles colocated, disjoint and mixed, with parts kept or on the host: one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow_cases import run_layouts
from replay import assert_same_samples, versions
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

ROLES = ("policy", "reference", "reward", "value", "rollout")
DISJOINT = [
    "roles.policy.ranks=0",
    "roles.rollout.ranks=same as policy",
    "roles.reference.ranks=1",
    "roles.reward.ranks=2",
    "roles.value.ranks=3",
]
MIXED = [
    "roles.policy.ranks=0-1",
    "roles.policy.tp=2",
    "roles.reference.ranks=1-2",
    "roles.reward.ranks=2",
    "roles.value.ranks=0-3",
    "roles.value.dp_shard=2",
    "roles.rollout.ranks=2-3",
]
ON_HOST = [
    *(f"roles.{role}.residency.weights=host" for role in ROLES[:4]),
    "roles.policy.residency.optimizer=host",
    "roles.value.residency.optimizer=host",
    "roles.rollout.residency.kv_cache=drop",
]
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": [], "one on host": ON_HOST},
    2: {
        "colocated": [],
        "colocated on host": ON_HOST,
        "value and reward beside": ["roles.value.ranks=1", "roles.reward.ranks=1"],
    },
    4: {"colocated, tp": ["roles.policy.tp=2", "roles.value.tp=2"], "disjoint": DISJOINT}
    | {"mixed": MIXED, "mixed on host": [*MIXED, *ON_HOST, "roles.rollout.residency.weights=drop"]},
}
METRICS = (
    *("loss", "grad_norm", "entropy", "clip_fraction", "score", "kl_per_response", "kl_coef"),
    *("shaped_reward", "advantage_std", "value/loss", "value/grad_norm"),
    *("value/explained_variance", "reward", "sample_lag"),
)


def settings(root: Path, **sections: Any) -> dict[str, Any]:
    scalar = {"model": str(root / "scalar")}
    return {
        "flow": "ppo",
        "environment": "replay:ReplayEnvironment",
        "roles": {
            "policy": {},
            "reference": {},
            "reward": scalar,
            "value": {**scalar, "train": {"lr": 5e-3}},
            "rollout": {},
        },
        "rewards": [{"role": "reward", "weight": 0.5}],
        "algorithm": {
            "kl_coef": 0.05,
            "kl_target": 1.0,
            "kl_horizon": 100,
            "score_scaling": "whiten",
            "score_clip": 3.0,
            "cut_penalty": 0.1,
            "entropy_coef": 0.01,
        },
        "train": {"lr": 1e-3, "microbatch_tokens": 300, "num_minibatches": 2, "epochs": 2},
        **sections,
    }


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Layout name -> metrics of three steps, and the directory of the recorded rows."""
    root = tmp_path_factory.mktemp("ppo")
    make_tiny_model(root / "model")
    make_tiny_model(root / "scalar", seed=1, head="score")
    return run_layouts(root, only(LAYOUTS, asked(request, "name")), **settings(root)), root


# colocated with parts that move, some roles elsewhere, and all of it with axes; `lagged` has all
# roles disjoint
BRIEF = ("value and reward beside",)
NAMES = swept([n for own in LAYOUTS.values() for n in own if n != "one"], BRIEF)


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_one_rank(runs, name):
    one, other = runs[0]["one"], runs[0][name]
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in METRICS:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step


def test_the_run_moves_what_it_should(runs):
    one = runs[0]["one"]
    assert all(record["grad_norm"] > 0 and record["value/grad_norm"] > 0 for record in one)
    assert abs(one[2]["kl_per_response"]) > 1e-4, "the policy stays at the reference"
    assert one[2]["kl_coef"] != one[0]["kl_coef"], "the coefficient does not adapt"
    # the value model learns: its error falls
    assert one[2]["value/value_error"] < one[0]["value/value_error"]


@pytest.mark.parametrize("name", NAMES)
def test_first_step_samples_equal_one_rank(runs, name):
    assert_same_samples(runs[1], name)


def test_each_role_has_its_own_epochs_and_minibatches(tmp_path):
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "scalar", seed=1, head="score")
    sections = settings(tmp_path, steps=1, train={"lr": 1e-3, "epochs": 2, "warmup_steps": 100})
    sections["roles"]["value"]["train"] = {"lr": 5e-3, "epochs": 3, "num_minibatches": 2}
    (record,) = run_layouts(tmp_path, {1: {"own": []}}, **sections)["own"]
    assert record["value/update_tokens"] / record["update_tokens"] == 3 / 2
    # in the warm-up the mean rate of k steps is (k + 1) / 2 hundredths of the whole
    assert record["lr"] == pytest.approx(1.5e-2 * 1e-3)
    assert record["value/lr"] == pytest.approx(3.5e-2 * 5e-3)


LAG = {"lag": 1, "algorithm": {"kl_coef": 0.05, "importance_cap": 2.0}}


@pytest.fixture(scope="module")
def lagged(request, tmp_path_factory):
    """With `lag: 1`: metrics of colocated and disjoint runs, and what the steps trained on."""
    root = tmp_path_factory.mktemp("lag")
    make_tiny_model(root / "model")
    make_tiny_model(root / "scalar", seed=1, head="score")
    apart = [*DISJOINT[2:], "roles.policy.ranks=0", "roles.rollout.ranks=1"]
    layouts = {1: {"one": []}, 2: {"colocated": []}, 4: {"disjoint": apart}}
    chosen = only(layouts, asked(request, "lagging"))
    return run_layouts(root, chosen, **{**settings(root), **LAG}), root


# on one rank all are colocated
LAGGING = swept(["colocated", "disjoint"], [])


@pytest.mark.parametrize("lagging", LAGGING)
def test_one_step_off_policy_is_the_same_colocated_and_disjoint(lagged, lagging):
    one, other = lagged[0]["one"], lagged[0][lagging]
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in METRICS:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
    assert [record["sample_lag"] for record in other] == [0.0, 4.0, 4.0], "optimizer steps behind"


@pytest.mark.parametrize("lagging", LAGGING)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_one_step_off_policy_samples_are_the_same(lagged, lagging, step):
    assert_same_samples(lagged[1], lagging, step)


@pytest.mark.parametrize("lagging", swept(["one", "colocated", "disjoint"], []))
def test_one_step_off_policy_samples_carry_the_version_before_the_update(lagged, lagging):
    found = [versions(lagged[1], lagging, step) for step in range(3)]
    assert found == [{0}, {0}, {4}]
