"""GRPO with one adapter for all experts of a layer: any layout and engine trains as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flow_cases import run_layouts
from replay import assert_same_samples
from spmdrl.models.config import read_config
from spmdrl.models.files.peft import open_adapter
from spmdrl.models.tensors import Slice
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": []},
    2: {
        "ep over tp": [
            *(f"roles.{role}.{axis}=2" for role in ("policy", "rollout") for axis in ("tp", "ep"))
        ],
        "tp, whole engines": ["roles.policy.tp=2", "rollout.adapters=unmerged"],
        "ep over shards, merged": [
            "roles.policy.dp_shard=2",
            "roles.policy.ep=2",
            "roles.rollout.tp=2",
            "rollout.adapters=merged",
        ],
    },
}
NAMES = swept(LAYOUTS[2], ["ep over tp", "ep over shards, merged"])
METRICS = ("loss", "grad_norm", "entropy", "reward")
SETTINGS: dict[str, Any] = {
    "steps": 2,
    "environment": "replay:ReplayEnvironment",
    "roles": {"policy": {"adapter": {"rank": 3, "experts": "shared"}}, "rollout": {}},
    "algorithm": {"importance_cap": 2.0, "routing_replay": True},
    "train": {"lr": 1e-2, "microbatch_tokens": 300, "num_minibatches": 2},
    "checkpoint": {"export": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shared_experts")
    make_tiny_model(root / "model", "Qwen3MoeForCausalLM")
    return root


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, root: Path) -> dict[str, list[dict[str, float]]]:
    return run_layouts(root, only(LAYOUTS, asked(request, "name")), **SETTINGS)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_layouts_and_engines_train_as_one_process(runs, root: Path, name: str) -> None:
    one, other = runs["one"], runs[name]
    assert len(one) == len(other) == 2
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for metric in METRICS:
            assert b[metric] == pytest.approx(a[metric], rel=2e-4, abs=1e-6), (step, metric)
        assert b["rollout_gap_max"] < 1e-4, step
    assert_same_samples(root, name)
    (file, ours), (_, theirs) = (
        (f := root / run / "model" / "adapter_model.safetensors", load_file(f))
        for run in (name, "one")
    )
    assert ours.keys() == theirs.keys(), file
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.full
def test_the_export_has_a_copy_for_each_expert(runs, root: Path) -> None:
    model, path = read_config(root / "model"), root / "one" / "model"
    shared = open_adapter(path, model, experts="shared")
    name = "model.layers.0.mlp.experts.down_proj.lora_B.weight"
    shape = (model.hidden_size, 3)
    part = Slice(name=name, shape=shape, start=(0, 0), stop=shape, offset=0)
    assert shared.read(part).abs().max() > 1e-3, "trained"
    assert len(shared.names) == 2 * (8 + 6), "2 layers"
    assert len(open_adapter(path, model).names) == 2 * (8 + 8 * 6), "8 experts"
