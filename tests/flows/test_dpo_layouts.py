"""DPO, its kin and online DPO on 1, 2 and 4 ranks in every layout: same losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_sft_and_reward_model import write_pairs

from flow_cases import run_configs, run_layouts
from harness import run_ranks
from replay import assert_same_samples
from saved_runs import CLOCKS as TIMES
from spmdrl.observe.metrics import read_metrics
from sweeps import asked, only, swept
from tiny_model import make_tiny_model

CLOCKS = (*TIMES, "sync")

LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": []},
    2: {
        "dp2": [],
        "dp2, tiny microbatches, no sharing": [
            "train.microbatch_tokens=60",
            "train.share_prompts=false",
        ],
        "shard2": ["roles.policy.dp_shard=2"],
        "tp2": ["roles.policy.tp=2"],
        "cp2": ["roles.policy.cp=2"],
    },
    4: {
        "dp2 x tp2": ["roles.policy.tp=2"],
        "shard2 x cp2": ["roles.policy.dp_shard=2", "roles.policy.cp=2"],
        "disjoint": ["roles.policy.ranks=0-1", "roles.reference.ranks=2-3"],
    },
}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.2, "label_smoothing": 0.1, "nll_coef": 0.1},
    "ipo": {"loss": "ipo", "beta": 0.3},
    "kto": {"loss": "kto", "beta": 0.2, "kto_weights": [1.0, 1.2]},
    "simpo": {"loss": "simpo", "beta": 2.0, "margin": 0.5},
    "orpo": {"loss": "orpo", "beta": 0.5},
}


def write_dpo(root: Path, name: str, loss: str) -> Path:
    roles: dict[str, Any] = {"policy": {}}
    if loss not in ("simpo", "orpo"):
        roles["reference"] = {"model": str(root / "other")}
    content = {
        "flow": "dpo",
        "steps": 3,
        "seed": 1,
        "run_dir": str(root / name),
        "model": {"path": str(root / "model")},
        "roles": roles,
        "preference": LOSSES[loss],
        "data": {
            "prompts_per_step": 6,
            "train": {
                "source": str(root / "pairs.jsonl"),
                "prompt_column": "prompt",
                "max_tokens": 120,
            },
        },
        "train": {"lr": 1e-3, "microbatch_tokens": 200, "num_minibatches": 2},
        "evaluation": {"held_out": 12},
        "log": {"tensorboard": False, "progress": False},
        "checkpoint": {"export": False},
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


TINY = "dp2, tiny microbatches, no sharing"


def cases() -> list[tuple[int, str, str]]:
    """(ranks, loss, layout): all layouts for DPO, two of them for the others."""
    found = []
    for size, layouts in LAYOUTS.items():
        for layout in layouts:
            for loss in LOSSES:
                if loss == "dpo" or layout in ("one", TINY, "tp2"):
                    found.append((size, loss, layout))
    return found


# KTO has a baseline over the world, ORPO no reference
BRIEF = [("kto", TINY)]
BRIEF += [("dpo", layout) for layout in (TINY, "shard2 x cp2")]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dpo")
    make_tiny_model(root / "model")
    make_tiny_model(root / "other", seed=1)
    write_pairs(root / "pairs.jsonl")
    return root


@pytest.fixture(scope="module")
def runs(request, root):
    """(loss, layout) -> all metrics records."""
    found = {}
    wanted = asked(request, "loss", "layout")
    wanted |= {(loss, "one") for loss in {loss for loss, _ in wanted} | asked(request, "loss")}
    for size in LAYOUTS:
        configs, keys = [], []
        chosen = [c for c in cases() if c[0] == size and (c[1], c[2]) in wanted]
        for number, (_, loss, layout) in enumerate(chosen):
            path = write_dpo(root, f"dpo_{size}_{number}", loss)
            words = [w for w in LAYOUTS[size][layout] if "reference" not in w or loss == "dpo"]
            configs.append((str(path), words))
            keys.append((loss, layout, root / f"dpo_{size}_{number}"))
        if configs:
            run_ranks(run_configs, size, configs, str(root), timeout_s=300)
        for loss, layout, run_dir in keys:
            found[loss, layout] = read_metrics(run_dir / "metrics.jsonl")
    return found


@pytest.mark.parametrize(
    ("loss", "layout"), swept([(c[1], c[2]) for c in cases() if c[0] > 1], BRIEF)
)
def test_metrics_equal_one_rank(runs, loss, layout):
    one, other = runs[loss, "one"], runs[loss, layout]
    assert len(one) == len(other) == 5
    for a, b in zip(one, other, strict=True):
        assert {n for n in a if not n.startswith(TIMES)} == {
            n for n in b if not n.startswith(TIMES)
        }
        for name, value in a.items():
            if not name.startswith(CLOCKS):
                assert b[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("loss", LOSSES)
def test_training_moves_held_out_preferences(runs, loss):
    records = [r for r in runs[loss, "one"] if "eval/held_out/margin" in r]
    assert records[-1]["eval/held_out/margin"] > records[0]["eval/held_out/margin"]
    steps = [r for r in runs[loss, "one"] if "loss" in r]
    assert all(r["pairs"] == 6 for r in steps) and min(r["grad_norm"] for r in steps) > 0
    assert all(("kl_baseline" in r) == (loss == "kto") for r in steps)


ONLINE = {
    "flow": "online_dpo",
    "environment": "replay:ReplayEnvironment",
    "preference": {"beta": 0.2, "pairs": "all"},
    "train": {"lr": 1e-3, "microbatch_tokens": 300, "num_minibatches": 2},
}
ONLINE_LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": []},
    2: {
        "dp2": ["train.microbatch_tokens=60"],
        "tp2": ["roles.policy.tp=2", "roles.rollout.tp=2", "roles.reference.tp=2"],
        "cp2": ["roles.policy.cp=2", "roles.reference.cp=2"],
    },
    4: {
        "shard2 x tp2, rollout dp4": ["roles.policy.tp=2", "roles.policy.dp_shard=2"],
        "disjoint": ["roles.policy.ranks=0-1", "roles.reference.ranks=2-3"],
    },
}


@pytest.fixture(scope="module")
def online(request, root):
    """Layout -> metrics of three steps of online DPO."""
    # another reference: the first step's gaps are then no rounding
    roles = {"policy": {}, "reference": {"model": str(root / "other")}, "rollout": {}}
    layouts = only(ONLINE_LAYOUTS, asked(request, "name"))
    return run_layouts(root, layouts, "online ", **ONLINE, roles=roles)


# the pairs of a step are made at home: the axes of the roles are test_layouts's
ONLINE_NAMES = swept([n for s, ls in ONLINE_LAYOUTS.items() if s > 1 for n in ls], ["tp2"])


@pytest.mark.parametrize("name", ONLINE_NAMES)
def test_online_dpo_equals_one_rank(online, name):
    one, other = online["one"], online[name]
    assert len(one) == len(other) == 3
    for a, b in zip(one, other, strict=True):
        for metric in ("loss", "grad_norm", "margin", "accuracy", "reward", "pairs", "nll"):
            assert b[metric] == pytest.approx(a[metric], rel=2e-4, abs=1e-5), metric
    assert one[0]["pairs"] > 5 and one[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", ONLINE_NAMES)
def test_online_dpo_samples_equal_one_rank(online, root, name):
    assert_same_samples(root, f"online {name}")


@pytest.mark.full
def test_online_dpo_one_step_off_policy(root, tmp_path):
    """With `lag: 1` the next step's samples are drawn beside the update, from the older policy."""
    roles = {"policy": {}, "reference": {"model": str(root / "other")}, "rollout": {}}
    (tmp_path / "model").symlink_to(root / "model")
    layouts = {1: {"one": []}, 2: {"disjoint": ["roles.policy.ranks=0", "roles.rollout.ranks=1"]}}
    runs = run_layouts(tmp_path, layouts, **ONLINE, roles=roles, lag=1)
    one, other = runs["one"], runs["disjoint"]
    assert [record["sample_lag"] for record in one] == [0.0, 2.0, 2.0], "optimizer steps behind"
    for a, b in zip(one, other, strict=True):
        for metric in ("loss", "grad_norm", "margin", "reward", "pairs", "sample_lag"):
            assert b[metric] == pytest.approx(a[metric], rel=2e-4, abs=1e-5), metric
    for step in range(3):
        assert_same_samples(tmp_path, "disjoint", step)
