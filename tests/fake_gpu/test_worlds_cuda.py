"""Worlds of two and four ranks over NCCL on the stand-in CUDA: every axis, roles apart and
together. In float32 they give what one rank gives on the CPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from replay import assert_same_samples
from tiny_model import make_tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "flows"))
sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from test_ppo_layouts import DISJOINT, LAG, settings
from test_weight_sync import random_syncs

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.fakegpu

SHAPE = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "intermediate_size": 512}
EXPERTS = {"moe_intermediate_size": 128, "num_experts": 16, **SHAPE}
TRAIN = {"lr": 1e-4, "microbatch_tokens": 300, "num_minibatches": 2}
GRPO = {"train": TRAIN, "algorithm": {"kl_coef": 0.1, "importance_cap": 2.0}}
SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {**GRPO, "roles": {"policy": {}, "reference": {}, "rollout": {}}},
    "experts": {
        "algorithm": {"routing_replay": True},
        "train": {**TRAIN, "balance_coef": 0.01, "recompute": "layer"},
    },
}
"""Sections of a configuration by kind of run; those of `ppo`, `lag` and `base` name a directory."""

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "policy": {"adapter": {"rank": 4}},
    "reference": {"base": "policy"},
    "value": {"base": "policy", "adapter": {"rank": 3}, "head": "normal"},
}
"""Roles of `base`: three on the policy's weights."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`words` of a run of `kind` on `size` ranks; `runs` lists the dtypes."""

    size: int
    words: list[str]
    kind: str = "grpo"
    runs: tuple[str, ...] = ("float32", "bfloat16")


TP2 = ["roles.policy.tp=2", "roles.rollout.tp=2", "roles.reference.tp=2"]
APART = [*DISJOINT[2:], "roles.policy.ranks=0", "roles.rollout.ranks=1"]
ONE_BASE = ("policy", "reference", "value")
LAYOUTS = {
    "dp2": Layout(size=2, words=[]),
    "shard2": Layout(size=2, words=["roles.policy.dp_shard=2"]),
    "tp2": Layout(size=2, words=TP2),
    "cp2": Layout(size=2, words=["roles.policy.cp=2", "roles.reference.cp=2"]),
    "ep2": Layout(size=2, words=["roles.policy.dp_shard=2", "roles.policy.ep=2"], kind="experts"),
    "disjoint 1+1": Layout(size=2, words=["roles.policy.ranks=0", "roles.rollout.ranks=1"]),
    "hsdp": Layout(size=4, words=["roles.policy.dp_replicate=2", "roles.policy.dp_shard=2"]),
    "shard2 x tp2": Layout(size=4, words=["roles.policy.dp_shard=2", "roles.policy.tp=2"]),
    "disjoint 2+2": Layout(
        size=4,
        words=[
            "roles.policy.ranks=0-1",
            "roles.policy.dp_shard=2",
            "roles.rollout.ranks=2-3",
            "roles.rollout.tp=2",
        ],
    ),
    "disjoint 3+1": Layout(size=4, words=["roles.policy.ranks=0-2", "roles.rollout.ranks=3"]),
    # the first messages of the world's group are those of two ranks; the others never join in
    "first_to_last": Layout(
        size=4,
        words=[
            "roles.policy.ranks=0",
            "roles.rollout.ranks=3",
            "roles.reference=null",
            "algorithm.kl_coef=0",
        ],
        runs=("bfloat16",),
    ),
    "ppo apart": Layout(size=4, words=DISJOINT, kind="ppo"),
    "ppo lag 1": Layout(size=4, words=APART, kind="lag", runs=("float32",)),
    "one base, tp2": Layout(
        size=2, words=[*(f"roles.{role}.tp=2" for role in ONE_BASE)], kind="base"
    ),
    "one base, shard2": Layout(
        size=2,
        words=[*(f"roles.{role}.dp_shard=2" for role in ONE_BASE)],
        kind="base",
        runs=("float32",),
    ),
}
QUICK = {("first_to_last", "bfloat16"), ("shard2 x tp2", "float32")}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worlds_cuda")
    for kind in ("grpo", "experts", "ppo", "lag", "base"):
        (root / kind).mkdir()
        if kind == "experts":
            make_tiny_model(root / kind / "model", "Qwen3MoeForCausalLM", **EXPERTS)
        else:
            make_tiny_model(root / kind / "model", **SHAPE)
        make_tiny_model(root / kind / "scalar", seed=1, head="score", **SHAPE)
    return root


def run(root: Path, kind: str, name: str, size: int, words: list[str]) -> list[dict[str, float]]:
    """The metrics of two steps of `kind` on the device that `words` name; in float32 the first run
    records its samples, and the others train on them from the second step on.
    """
    sections = dict(SECTIONS.get(kind, {}))
    if kind in ("ppo", "lag", "base"):
        sections = settings(root) | (LAG if kind == "lag" else {})
        # slower than on the tiny models, whose rounding errors grow less in an update
        sections["train"] = {**sections["train"], "lr": 2e-5}
    if kind == "base":
        sections["roles"] = {**sections["roles"], **ADAPTERS}
        sections["train"] = {**sections["train"], "lr": 5e-4}
    if "model.dtype=bfloat16" in words:
        sections.pop("environment", None)
    else:
        sections["environment"] = "replay:ReplayEnvironment"
    path = write_config(
        root / f"{name}.yaml",
        root / "model",
        root / name,
        **{
            **sections,
            "data": questions(root / "questions.jsonl"),
            "steps": 2,
        },
    )
    device = "cuda" if "device=cuda" in words else "cpu"
    records: list[dict[str, float]] = run_ranks(
        run_configs, size, [(str(path), words)], str(root), timeout_s=600, device=device
    )[0][0]
    return records


@pytest.fixture(scope="module")
def one(roots: Path) -> dict[str, list[dict[str, float]]]:
    """Kind -> the metrics of one rank on the CPU, which are made when first asked for."""
    return {}


def cases() -> list[Any]:
    return [
        pytest.param(name, dtype, marks=[pytest.mark.quick] if (name, dtype) in QUICK else [])
        for name, layout in LAYOUTS.items()
        for dtype in layout.runs
    ]


@pytest.mark.parametrize(("name", "dtype"), cases())
def test_world(roots: Path, one: dict[str, list[dict[str, float]]], name: str, dtype: str) -> None:
    layout = LAYOUTS[name]
    root, kind = roots / layout.kind, layout.kind
    if kind not in one:
        one[kind] = run(root, kind, "one", 1, ["device=cpu"])
    run_name = f"{name}_{dtype}".replace(" ", "_")
    words = [*layout.words, "device=cuda", f"model.dtype={dtype}"]
    found = run(root, kind, run_name, layout.size, words)
    assert len(found) == len(one[kind]) == 2
    for step, (record, expected) in enumerate(zip(found, one[kind], strict=True)):
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
        if kind != "lag":  # whose samples are those of an older policy
            assert record["rollout_gap_max"] < (1e-3 if dtype == "float32" else 0.5)
        if dtype == "float32":
            # Adam divides by what is left of small gradients, so updates amplify rounding
            rel = 2e-2 if step else 1e-3
            for metric in ("loss", "grad_norm", "entropy", "reward"):
                value = pytest.approx(expected[metric], rel=rel, abs=1e-5)
                assert record[metric] == value, (step, metric)
    if dtype == "float32":
        assert_same_samples(root, run_name)


@pytest.mark.parametrize(("size", "count"), [(2, 4), (4, 8)])
def test_random_layouts_over_nccl(size: int, count: int) -> None:
    assert run_ranks(random_syncs, size, count, timeout_s=600, device="cuda")[0] > 0


def test_a_stopped_run_resumes_over_nccl(roots: Path) -> None:
    root = roots / "grpo"
    words = ["roles.policy.dp_shard=2", "device=cuda", "model.dtype=bfloat16"]
    stop = f"environment={TESTS / 'stopping.py'}:StopAfterTwo"
    configs = {}
    for name in ("whole", "parts"):
        configs[name] = write_config(
            root / f"{name}.yaml",
            root / "model",
            root / name,
            **{**SECTIONS["grpo"], "data": questions(root / "questions.jsonl"), "steps": 3},
        )
    runs = [
        (str(configs["whole"]), words),
        (str(configs["parts"]), [*words, stop]),
        (str(configs["parts"]), words),
    ]
    whole, stopped, resumed = run_ranks(
        run_configs, 2, runs, str(root), timeout_s=600, device="cuda"
    )[0]
    assert len(stopped) < 3 and len(resumed) == len(whole) == 3
    for a, b in zip(whole, resumed, strict=True):
        for metric in ("loss", "grad_norm", "reward"):
            assert b[metric] == pytest.approx(a[metric], rel=1e-6), metric
