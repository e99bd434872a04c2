"""Any role on any backend: every pair of train backend and rollout engine, and mixes of PPO's four
roles, each in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_ppo_layouts import METRICS, settings

from backend_cases import BACKENDS, GRPO, Records, assert_same_steps, words_of
from flow_cases import run_configs, write_config
from harness import run_ranks
from replay import assert_same_samples
from spmdrl.planning.systems.registry import SYSTEMS
from spmdrl.world import World
from tiny_model import make_tiny_model
from vllm_cases import needs_vllm

pytestmark = [pytest.mark.contract, pytest.mark.megatron, pytest.mark.full]

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
ENGINES: dict[str, dict[str, Any]] = {
    "native": {"engine": "native"},
    "vllm": {"engine": "vllm", "block_size": 16},
}
FIRST = ("loss", "grad_norm", "entropy", "reward", "reward_std")
"""What a first step decides: the policy has hardly left the reference yet."""

PAIRS = [(backend, engine) for engine in ENGINES for backend in BACKENDS]

LAST = tuple(SYSTEMS)[-1]
"""The backend that was registered last, in the mixes that ask for one beside the others."""

MIXES: dict[str, tuple[str, dict[str, str], list[str]]] = {
    # name: engine, backend of each role, and words of layouts
    "policy on megatron": (
        "native",
        {"policy": "megatron", "value": LAST, "reference": "torch", "reward": "torch"},
        ["roles.policy.tp=2", "roles.rollout.tp=2"],
    ),
    "critic on megatron, away from the rollout": (
        "native",
        {"policy": "torch", "value": "megatron", "reference": "megatron", "reward": "torch"},
        ["roles.policy.dp_shard=2", "roles.value.pp=2", "roles.reference.tp=2"]
        + ["roles.rollout.ranks=1", "roles.reward.ranks=0"],
    ),
    "sampled by vllm": (
        "vllm",
        {"policy": LAST, "value": "torch", "reference": "torch", "reward": "megatron"},
        ["roles.value.dp_shard=2", "roles.rollout.tp=2", "roles.reward.tp=2"],
    ),
}
ALIKE = {engine: f"torch, {engine}" for engine in ENGINES}
"""Engine -> the run with all roles on torch that its mixes are compared with."""

Runs = dict[str, list[Records]]
"""Directory -> metrics of its runs."""


def ranks(world: World, configs: dict[str, list[tuple[str, list[str]]]]) -> Runs:
    """One launch for all runs: every backend and both engines meet in each process."""
    return {root: run_configs(world, given, root) for root, given in configs.items()}


def make_models(root: Path) -> None:
    make_tiny_model(root / "model", **SHAPE)
    make_tiny_model(root / "scalar", seed=1, head="score", **SHAPE)


def config_at(root: Path, place: Path, name: str, sections: dict[str, Any]) -> str:
    """A configuration whose run is recorded or replayed at `place`."""
    place.mkdir(exist_ok=True)
    return str(write_config(place / f"{name}.yaml", root / "model", place / name, **sections))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, str], Records], Path]:
    root = tmp_path_factory.mktemp("pairs")
    make_models(root)
    configs: dict[str, list[tuple[str, list[str]]]] = {}
    for backend, engine in PAIRS:
        roles = {**GRPO["roles"], "rollout": {"tp": 2}}
        given = {**GRPO, "roles": roles, "rollout": ENGINES[engine], "steps": 1}
        path = config_at(root, root / engine, backend, given)
        configs.setdefault(str(root / engine), []).append((path, words_of(backend)))
    found = run_ranks(ranks, 2, configs, timeout_s=600)[0]
    records = [record for runs in found.values() for record in runs]
    return dict(zip(PAIRS, records, strict=True)), root


@pytest.fixture(scope="module")
def mixes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Records], Path]:
    root = tmp_path_factory.mktemp("mixes")
    make_models(root)
    asked: dict[str, tuple[str, dict[str, str], list[str]]] = {
        name: (engine, {}, []) for engine, name in ALIKE.items()
    }
    configs: dict[str, list[tuple[str, list[str]]]] = {}
    names: list[str] = []
    for name, (engine, backends, layout) in sorted({**asked, **MIXES}.items(), key=_engine_first):
        given = {**settings(root), "rollout": ENGINES[engine], "steps": 2}
        path = config_at(root, root / engine, name, given)
        words = [f"roles.{role}.train.backend={backend}" for role, backend in backends.items()]
        configs.setdefault(str(root / engine), []).append((path, [*words, *layout]))
        names.append(name)
    found = run_ranks(ranks, 2, configs, timeout_s=400)[0]
    records = [record for runs in found.values() for record in runs]
    return dict(zip(names, records, strict=True)), root


def _engine_first(named: tuple[str, tuple[str, dict[str, str], list[str]]]) -> tuple[str, bool]:
    """The runs of an engine together, and of these the one on torch first, which is recorded."""
    name, (engine, _, _) = named
    return engine, name not in ALIKE.values()


@needs_vllm
@pytest.mark.parametrize(("backend", "engine"), PAIRS)
def test_every_pair_makes_the_same_step(pairs, backend: str, engine: str) -> None:
    runs, root = pairs
    found = runs[backend, engine]
    assert len(found) == 1
    assert found[0]["grad_norm"] > 0 and found[0]["rollout_gap_max"] < 1e-4
    # an engine that shares all of the policy's tensors has no sync to prove
    assert found[0].get("sync/canary_gap", 0.0) < 2e-5
    assert_same_steps(found, runs["torch", engine], FIRST)
    if backend != "torch":
        assert_same_samples(root / engine, backend)


@needs_vllm
@pytest.mark.parametrize("name", MIXES)
def test_a_mix_of_four_roles_equals_all_on_torch(mixes, name: str) -> None:
    (runs, root), engine = mixes, MIXES[name][0]
    assert len(runs[name]) == 2
    assert_same_steps(runs[name], runs[ALIKE[engine]], METRICS)
    assert all(record["rollout_gap_max"] < 1e-4 for record in runs[name])
    assert_same_samples(root / engine, name)
