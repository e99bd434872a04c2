"""PPO's four roles as adapters over one base: on any layout as with bases of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_ppo_layouts import DISJOINT, METRICS

from adapter_cases import OWN_BASES, make_peft, shared_roles
from flow_cases import run_layouts
from replay import assert_same_samples
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

ROLES = ("policy", "reference", "reward", "value", "rollout")


def all_roles(*words: str) -> list[str]:
    return [f"roles.{role}.{word}" for role in ROLES for word in words]


ON_HOST = [
    "roles.policy.residency.base=host",
    *(
        f"roles.{role}.residency.{part}=host"
        for role in ("policy", "value")
        for part in ("weights", "optimizer")
    ),
    "roles.rollout.residency.kv_cache=drop",
]
LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": [], "one on host": ON_HOST, "own bases": OWN_BASES},
    2: {
        "colocated": [],
        "tp": all_roles("tp=2"),
        "shards": all_roles("dp_shard=2"),
        "merged": ["rollout.adapters=merged"],
    },
    4: {"disjoint": [*OWN_BASES, *DISJOINT]},
}


def settings(root: Path, **sections: Any) -> dict[str, Any]:
    return {
        "flow": "ppo",
        "environment": "replay:ReplayEnvironment",
        "roles": shared_roles(root),
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
        "train": {"lr": 5e-3, "microbatch_tokens": 300, "num_minibatches": 2, "epochs": 2},
        **sections,
    }


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Layout name -> metrics of three steps, and the directory of the recorded rows."""
    root = tmp_path_factory.mktemp("adapters")
    make_tiny_model(root / "model")
    make_peft(root / "judge", root / "model", head="score", seed=1)
    names = asked(request, "name") | {"own bases"}
    return run_layouts(root, only(LAYOUTS, names), **settings(root)), root


BRIEF = ("tp",)
NAMES = swept([n for own in LAYOUTS.values() for n in own if n != "one"], BRIEF)


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_one_rank(runs, name):
    one, other = runs[0]["one"], runs[0][name]
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in METRICS:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step


@pytest.mark.parametrize("name", NAMES)
def test_first_step_samples_equal_one_rank(runs, name):
    assert_same_samples(runs[1], name)


def test_the_adapters_learn_and_the_reference_stays(runs):
    one = runs[0]["one"]
    assert all(record["grad_norm"] > 0 and record["value/grad_norm"] > 0 for record in one)
    assert one[0]["kl_per_response"] == pytest.approx(0, abs=1e-6), "B is 0 at first"
    assert abs(one[2]["kl_per_response"]) > 1e-4, "the policy stays at the reference"
    assert one[2]["value/value_error"] < one[0]["value/value_error"]


def test_one_base_is_held_once(runs):
    found, root = runs
    (file,) = (root / "model").glob("*.safetensors")
    base = sum(tensor.nbytes for tensor in load_file(file).values())
    for phase in ("logprobs", "update"):
        shared, own = (found[n][-1][f"memory/parts_gb/{phase}"] for n in ("one", "own bases"))
        assert (own - shared) * 1e9 == pytest.approx(3 * base), phase


# merged weights are the engine's own: the targets of the adapter
@pytest.mark.parametrize("name", ["one", *swept(["colocated", "tp", "merged"], ["tp"])])
def test_a_sync_moves_nothing_where_the_engine_has_the_policys_tensors(runs, name):
    assert [record.get("sync/gb", 0.0) for record in runs[0][name]] == [0.0] * 3
