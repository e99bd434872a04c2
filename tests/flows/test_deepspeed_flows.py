"""GRPO and PPO with roles that DeepSpeed trains: the same run as on the torch backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_ppo_layouts import METRICS, settings

from flow_cases import run_configs, run_layouts, write_config
from harness import run_ranks
from replay import assert_same_samples
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

pytestmark = pytest.mark.deepspeed

GRPO = {
    "environment": "replay:ReplayEnvironment",
    "roles": {"policy": {}, "reference": {}, "rollout": {}},
    "algorithm": {"kl_coef": 0.1, "importance_cap": 2.0},
    "train": {"lr": 1e-3, "microbatch_tokens": 300, "num_minibatches": 2},
}
GRPO_METRICS = ("loss", "grad_norm", "ref_kl", "entropy", "reward")
ZERO = ("train.backend=deepspeed", "roles.policy.dp_shard=2")
LAYOUTS: dict[str, list[str]] = {
    "zero2": [*ZERO, "roles.reference.tp=2"],
    "zero3": [*ZERO, "train.deepspeed.stage=3", "roles.rollout.tp=2"],
}
MORE: dict[str, list[str]] = {
    "zero1, on the host": [
        *("roles.policy.train.backend=deepspeed", "roles.policy.train.deepspeed.stage=1"),
        *("roles.policy.dp_shard=2", "roles.policy.residency.optimizer=host"),
        "roles.policy.residency.weights=host",
    ],
    "zero3, on the host": [
        *(*ZERO, "train.deepspeed.stage=3", "roles.policy.residency.optimizer=host"),
        *("roles.policy.residency.weights=host", "roles.reference.residency.weights=host"),
    ],
    "zero2, offloaded": [*ZERO, "train.deepspeed.offload=optimizer"],
    "zero2 tp": ["train.backend=deepspeed", "roles.policy.tp=2"],
}
PPO: dict[int, dict[str, list[str]]] = {
    1: {"one": []},
    2: {
        "zero3": [
            *(*ZERO, "train.deepspeed.stage=3", "roles.value.dp_shard=2"),
            "roles.reference.train.backend=deepspeed",
        ],
    },
    4: {
        "beside": [
            *("train.backend=deepspeed", "roles.policy.ranks=0-1", "roles.policy.dp_shard=2"),
            *("roles.value.ranks=2-3", "roles.value.train.deepspeed.stage=1"),
            *("roles.value.dp_shard=2", "roles.rollout.ranks=same as policy"),
        ],
    },
}


def assert_alike(one: list[Any], other: list[Any], metrics: Sequence[str]) -> None:
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in metrics:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step


@pytest.fixture(scope="module")
def grpo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("grpo")
    make_tiny_model(root / "model")
    layouts = only({1: {"one": []}, 2: LAYOUTS}, asked(request, "name"))
    return run_layouts(root, layouts, **GRPO), root


# test_backend_table.py has one of ZeRO 3 every time
@pytest.mark.parametrize("name", swept(LAYOUTS, []))
def test_grpo_equals_the_torch_backend(grpo: tuple[dict[str, Any], Path], name: str) -> None:
    found, root = grpo
    assert_alike(found["one"], found[name], GRPO_METRICS)
    assert found["one"][2]["ref_kl"] > 1e-4, "the policy has not moved away from the reference"
    assert_same_samples(root, name)


@pytest.mark.full
def test_more_layouts_of_grpo_equal_the_torch_backend(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    found = run_layouts(tmp_path, {1: {"one": []}, 2: MORE}, **GRPO)
    for name in MORE:
        assert_alike(found["one"], found[name], GRPO_METRICS)


@pytest.mark.full
def test_ppo_equals_the_torch_backend(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "scalar", seed=1, head="score")
    found = run_layouts(tmp_path, PPO, **settings(tmp_path))
    for name in ("zero3", "beside"):
        assert_alike(found["one"], found[name], METRICS)
        assert_same_samples(tmp_path, name)


@pytest.mark.full
def test_a_checkpoint_continues_on_another_stage_and_backend(
    grpo: tuple[dict[str, Any], Path],
) -> None:
    found, root = grpo
    path = write_config(root / "resumed.yaml", root / "model", root / "run_resumed", **GRPO)
    runs = [
        (str(path), [f"steps={step}", *words])
        for step, words in enumerate((LAYOUTS["zero3"], MORE["zero2 tp"], []), start=1)
    ]
    records = run_ranks(run_configs, 2, runs, str(root), timeout_s=300)[0][-1]
    assert_alike(found["one"], records, GRPO_METRICS)
