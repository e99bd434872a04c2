"""GRPO and PPO with policies that Megatron trains: the same run as on the torch backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_adapter_layouts import settings as over_one_base
from test_moe_layouts import SETTINGS as MOE
from test_ppo_layouts import METRICS, settings

from adapter_cases import OWN_BASES, make_peft
from flow_cases import run_configs, run_layouts, write_config
from harness import run_ranks
from replay import assert_same_samples
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

pytestmark = pytest.mark.megatron

PIPELINE = ["roles.policy.tp=2", "roles.policy.pp=2", "roles.rollout.tp=2"]
GRPO = {
    "environment": "replay:ReplayEnvironment",
    "roles": {"policy": {}, "reference": {}, "rollout": {}},
    "algorithm": {"kl_coef": 0.1, "importance_cap": 2.0},
    "train": {"lr": 1e-3, "microbatch_tokens": 300, "num_minibatches": 2},
}
GRPO_LAYOUTS: dict[str, list[str]] = {
    "tp2 pp2": [*PIPELINE, "roles.policy.train.backend=megatron"],
    "all of it": [
        *("train.backend=megatron", "roles.policy.dp_shard=2", "roles.policy.pp=2"),
        *("roles.reference.tp=2", "roles.reference.megatron.sp=true", "roles.rollout.tp=2"),
    ],
}
MOE_LAYOUTS: dict[str, list[str]] = {
    "tp2 pp2 ep2": [
        *(*PIPELINE, "roles.policy.train.backend=megatron", "roles.policy.ep=2"),
        "roles.policy.megatron.sp=true",
    ]
}
PPO_LAYOUTS: dict[str, list[str]] = {
    "tp2 pp2": [
        *(*PIPELINE, "train.backend=megatron", "roles.value.tp=4", "roles.value.megatron.sp=true"),
        *("roles.reference.train.backend=torch", "roles.reward.cp=2", "roles.reward.pp=2"),
    ],
    "parts on the host": [
        *(*PIPELINE, "train.backend=megatron", "roles.value.dp_shard=2", "roles.value.pp=2"),
        *(f"roles.{r}.residency.weights=host" for r in ("policy", "reference", "reward", "value")),
        *("roles.policy.residency.optimizer=host", "roles.value.residency.optimizer=host"),
    ],
}

ROLES = ("policy", "reference", "reward", "value", "rollout")
ADAPTER_LAYOUTS: dict[str, list[str]] = {
    "tp2 sp": [
        *("train.backend=megatron", *(f"roles.{role}.tp=2" for role in ROLES)),
        *(f"roles.{role}.megatron.sp=true" for role in ROLES[:-1]),
    ],
    "pp2, merged": [
        *("train.backend=megatron", "rollout.adapters=merged"),
        *(f"roles.{role}.pp=2" for role in ROLES[:-1]),
        *("roles.policy.residency.base=host", "roles.value.residency.optimizer=host"),
    ],
    "bases of their own": [
        *("train.backend=megatron", "roles.reference.train.backend=torch", *OWN_BASES),
        *("roles.policy.dp_shard=2", "roles.value.tp=2", "roles.reward.pp=2"),
    ],
}


def models(root: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    make_tiny_model(root / "model", **heads)
    make_tiny_model(root / "scalar", seed=1, head="score", **heads)


@pytest.fixture(scope="module")
def grpo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("grpo")
    models(root)
    layouts = only({1: {"one": []}, 4: GRPO_LAYOUTS}, asked(request, "name"))
    return run_layouts(root, layouts, **GRPO), root


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("moe")
    make_tiny_model(root / "model", "Qwen3MoeForCausalLM")
    return run_layouts(root, {1: {"one": []}, 4: MOE_LAYOUTS}, **MOE)


@pytest.fixture(scope="module")
def ppo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("ppo")
    models(root)
    layouts = only({1: {"one": []}, 4: PPO_LAYOUTS}, asked(request, "layout"))
    return run_layouts(root, layouts, **settings(root)), root


@pytest.fixture(scope="module")
def adapters(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("adapters")
    make_tiny_model(root / "model")
    make_peft(root / "judge", root / "model", head="score", seed=1)
    layouts = only({1: {"one": []}, 2: ADAPTER_LAYOUTS}, asked(request, "adapted"))
    return run_layouts(root, layouts, **over_one_base(root)), root


GRPO_NAMES = swept(GRPO_LAYOUTS, [])  # in brief PPO is enough


@pytest.mark.parametrize("name", GRPO_NAMES)
def test_grpo_equals_the_torch_backend(grpo, name):
    one, other = grpo[0]["one"], grpo[0][name]
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in ("loss", "grad_norm", "ref_kl", "entropy", "reward"):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step
    assert one[2]["ref_kl"] > 1e-4, "the policy has not moved away from the reference"


@pytest.mark.full
def test_grpo_on_experts_with_replay_equals_the_torch_backend(moe):
    for step, (a, b) in enumerate(zip(moe["one"], moe["tp2 pp2 ep2"], strict=True)):
        for metric in ("loss", "grad_norm", "ref_kl", "entropy", "expert_load_max", "balance_loss"):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)


def test_a_checkpoint_of_one_backend_continues_on_the_other(grpo):
    expected, root = grpo[0]["one"], grpo[1]
    path = write_config(root / "resumed.yaml", root / "model", root / "run_resumed", **GRPO)
    torch_first = ["steps=2", "roles.policy.dp_shard=2", "roles.policy.tp=2"]
    then = ["steps=3", *GRPO_LAYOUTS["tp2 pp2"]]
    runs = [(str(path), torch_first), (str(path), then)]
    records = run_ranks(run_configs, 4, runs, str(root), timeout_s=300)[0][1]
    assert len(records) == 3
    for metric in ("loss", "grad_norm", "ref_kl", "entropy"):
        assert records[2][metric] == pytest.approx(expected[2][metric], rel=1e-4, abs=1e-6), metric


@pytest.mark.full
def test_a_folded_pipeline_equals_the_torch_backend(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", num_hidden_layers=4)
    words = [
        *("roles.policy.train.backend=megatron", "roles.policy.tp=2", "roles.policy.pp=2"),
        *("roles.policy.megatron.vpp=2", "roles.policy.megatron.sp=true", "roles.rollout.tp=4"),
        *("roles.reference.ranks=2-3", "roles.reference.tp=2", "fold=true"),
    ]
    layouts = {1: {"one": [], "folded to 1": words}, 2: {"folded to 2": words}}
    found = run_layouts(tmp_path, layouts, **GRPO)
    for name in ("folded to 1", "folded to 2"):
        for step, (a, b) in enumerate(zip(found["one"], found[name], strict=True)):
            for metric in ("loss", "grad_norm", "ref_kl", "entropy", "reward"):
                assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert_same_samples(tmp_path, name)


PPO_NAMES = swept(PPO_LAYOUTS, ["tp2 pp2"])


@pytest.mark.parametrize("layout", PPO_NAMES)
def test_ppo_equals_the_torch_backend(ppo, layout):
    one, other = ppo[0]["one"], ppo[0][layout]
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in METRICS:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step


@pytest.mark.parametrize("name", GRPO_NAMES)
def test_first_step_samples_of_grpo_are_the_same(grpo, name):
    assert_same_samples(grpo[1], name)


@pytest.mark.parametrize("layout", PPO_NAMES)
def test_first_step_samples_of_ppo_are_the_same(ppo, layout):
    assert_same_samples(ppo[1], layout)


@pytest.mark.parametrize("adapted", swept(ADAPTER_LAYOUTS, []))
def test_ppo_over_one_base_equals_the_torch_backend(adapters, adapted):
    one, other = adapters[0]["one"], adapters[0][adapted]
    assert len(one) == len(other) == 3
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in METRICS:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step
    assert_same_samples(adapters[1], adapted)


@pytest.mark.full
def test_a_checkpoint_of_adapters_continues_on_the_other_backend(adapters):
    expected, root = adapters[0]["one"], adapters[1]
    path = write_config(
        root / "resumed.yaml", root / "model", root / "run_resumed", **over_one_base(root)
    )
    torch_first = ["steps=2", *(f"roles.{role}.tp=2" for role in ROLES)]
    then = ["steps=3", *ADAPTER_LAYOUTS["pp2, merged"]]
    runs = [(str(path), torch_first), (str(path), then)]
    records = run_ranks(run_configs, 2, runs, str(root), timeout_s=300)[0][1]
    assert len(records) == 3
    for metric in METRICS:
        assert records[2][metric] == pytest.approx(expected[2][metric], rel=1e-4, abs=1e-6), metric
