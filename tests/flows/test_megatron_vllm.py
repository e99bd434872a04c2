"""Policies that Megatron trains and vLLM samples from: the same run as on the torch backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_megatron_flows import GRPO
from test_ppo_layouts import METRICS, settings

from flow_cases import run_configs, write_config
from harness import run_ranks
from replay import assert_same_samples
from spmdrl.world import World
from tiny_model import make_tiny_model
from vllm_cases import needs_vllm

pytestmark = [pytest.mark.megatron, pytest.mark.full]

ROLLOUT = {"engine": "vllm", "block_size": 16, "sync_check_every": 1}
BACKENDS: dict[str, list[str]] = {
    "torch": [],
    "megatron": ["train.backend=megatron", "roles.policy.tp=2", "roles.policy.pp=2"],
}
FLOWS = {"grpo": ("loss", "grad_norm", "ref_kl", "entropy", "reward"), "ppo": METRICS}
"""Flow -> what it reports."""

Runs = dict[str, dict[str, list[dict[str, float]]]]
"""Flow -> backend -> metrics of each step."""


def run_flows(world: World, configs: dict[str, dict[str, str]], root: str) -> Runs:
    """One launch: starting vLLM on four ranks is what takes the time."""
    found = {}
    for flow, paths in configs.items():
        asked = [(path, BACKENDS[backend]) for backend, path in paths.items()]
        records = run_configs(world, asked, f"{root}/{flow}")
        found[flow] = dict(zip(paths, records, strict=True))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, Path]:
    root = tmp_path_factory.mktemp("megatron_vllm")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    make_tiny_model(root / "model", **heads)
    make_tiny_model(root / "scalar", seed=1, head="score", **heads)
    sections = {"grpo": GRPO, "ppo": settings(root)}
    configs: dict[str, dict[str, str]] = {}
    for flow in FLOWS:
        (root / flow).mkdir()
        configs[flow] = {}
        for backend in BACKENDS:
            path, run_dir = root / flow / f"{backend}.yaml", root / flow / backend
            roles = {**sections[flow]["roles"], "rollout": {"tp": 2}}
            given = {**sections[flow], "roles": roles, "rollout": ROLLOUT}
            write_config(path, root / "model", run_dir, **given)
            configs[flow][backend] = str(path)
    return run_ranks(run_flows, 4, configs, str(root), timeout_s=500)[0], root


@needs_vllm
@pytest.mark.parametrize("flow", FLOWS)
def test_runs_equal_the_torch_backend(runs: tuple[Runs, Path], flow: str) -> None:
    expected, found = (runs[0][flow][backend] for backend in ("torch", "megatron"))
    assert len(expected) == len(found) == 3
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        for metric in FLOWS[flow]:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step
        # the other steps train on the torch run's samples: what vLLM computes shows here
        assert 0 <= b["sync/canary_gap"] < 2e-5, step
        assert b["grad_norm"] > 0 and b["skipped"] == 0


@needs_vllm
def test_both_fold_to_one_rank(runs: tuple[Runs, Path]) -> None:
    found, root = runs
    config, words = str(root / "grpo" / "megatron.yaml"), BACKENDS["megatron"]
    case = (config, [*words, "fold=true", f"run_dir={root / 'grpo' / 'folded'}"])
    (folded,) = run_ranks(run_configs, 1, [case], str(root / "grpo"), timeout_s=300)[0]
    for step, (a, b) in enumerate(zip(found["grpo"]["torch"], folded, strict=True)):
        for metric in FLOWS["grpo"]:
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
    assert_same_samples(root / "grpo", "folded")


@needs_vllm
@pytest.mark.parametrize("flow", FLOWS)
def test_first_step_samples_are_the_same(runs: tuple[Runs, Path], flow: str) -> None:
    assert_same_samples(runs[1] / flow, "megatron")
