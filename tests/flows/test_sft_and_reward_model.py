"""Supervised fine-tuning and reward models: one result on any layout, models to load elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from data_sources import data_source
from flow_cases import run_configs
from harness import run_ranks
from saved_runs import CLOCKS
from spmdrl.data.preferences import load_preferences
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.observe.metrics import read_metrics
from sweeps import asked, swept
from tiny_model import make_tiny_model

WORDS = ("red", "green", "blue", "white", "black")


def write_pairs(path: Path) -> Path:
    """Polite answers are chosen: a difference that a toy model can learn."""
    rows = [
        {
            "prompt": f"Name {WORDS[i % 5]} thing {i // 3}.",
            "chosen": f"please {WORDS[i % 4]} {i}",
            "rejected": f"no {WORDS[i % 3]} {i} {i}",
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(root: Path, name: str, flow: str, roles: dict[str, Any], **sections: Any) -> Path:
    content = {
        "flow": flow,
        "steps": 6,
        "seed": 1,
        "run_dir": str(root / name),
        "model": {"path": str(root / "model")},
        "roles": roles,
        "data": {
            "prompts_per_step": 6,
            "train": {
                "source": str(root / "pairs.jsonl"),
                "prompt_column": "prompt",
                "columns": {"response": "chosen"} if flow == "sft" else {},
                "max_tokens": 120,
            },
        },
        "train": {"lr": 3e-3, "microbatch_tokens": 200, "num_minibatches": 2},
        "evaluation": {"held_out": 12},
        "log": {"tensorboard": False, "progress": False},
        **sections,
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


LAYOUTS: dict[int, dict[str, list[str]]] = {
    1: {"one": []},
    2: {"dp2": [], "shard2": ["dp_shard=2"], "tp2": ["tp=2"]},
    4: {"dp2 x tp2": ["tp=2"], "shard2 x cp2": ["dp_shard=2", "cp=2"]},
}
FLOWS = {
    "sft": ("policy", {"policy": {}}),
    "reward_model": ("reward", {"reward": {"head": "normal", "trained": True}}),
}
EXPORTED = ("reward_model", "shard2")
BRIEF = [EXPORTED, ("reward_model", "shard2 x cp2"), ("sft", "dp2")]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """(flow, layout) -> all metrics records."""
    root = tmp_path_factory.mktemp("supervised")
    make_tiny_model(root / "model")
    write_pairs(root / "pairs.jsonl")
    found = {}
    wanted = asked(request, "flow", "layout") | {(flow, "one") for flow in FLOWS}
    wanted.add(EXPORTED)
    for size, layouts in LAYOUTS.items():
        configs, keys = [], []
        for flow, (role, roles) in FLOWS.items():
            for layout, words in layouts.items():
                if (flow, layout) not in wanted:
                    continue
                name = f"{flow}_{layout.replace(' ', '')}"
                path = write(root, name, flow, roles)
                configs.append((str(path), [f"roles.{role}.{word}" for word in words]))
                keys.append((flow, layout))
        if configs:
            run_ranks(run_configs, size, configs, str(root), timeout_s=300)
        for (flow, layout), (path, _) in zip(keys, configs, strict=True):
            run_dir = Path(yaml.safe_load(Path(path).read_text())["run_dir"])
            found[flow, layout] = (run_dir, read_metrics(run_dir / "metrics.jsonl"))
    return root, found


NAMES = swept([(f, n) for f in FLOWS for s, own in LAYOUTS.items() if s > 1 for n in own], BRIEF)


@pytest.mark.parametrize(("flow", "layout"), NAMES)
def test_metrics_equal_one_rank(runs, flow, layout):
    one, other = runs[1][flow, "one"][1], runs[1][flow, layout][1]
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert {n for n in a if not n.startswith(CLOCKS)} == {
            n for n in b if not n.startswith(CLOCKS)
        }
        for name, value in a.items():
            if not name.startswith(CLOCKS):
                assert b[name] == pytest.approx(value, rel=5e-4, abs=1e-5), name


def test_both_learn(runs):
    likelihood = [
        r["eval/held_out/nll"] for r in runs[1]["sft", "one"][1] if "eval/held_out/nll" in r
    ]
    assert likelihood[-1] < likelihood[0] - 0.2
    records = runs[1]["reward_model", "one"][1]
    accuracy = [r["eval/held_out/accuracy"] for r in records if "eval/held_out/accuracy" in r]
    assert accuracy[-1] > 0.9 > accuracy[0]
    assert all(r["pairs"] == 6 for r in records if "loss" in r)


def test_exported_models_load_in_transformers(runs):
    root, found = runs
    AutoModelForCausalLM.from_pretrained(found["sft", "one"][0] / "model")
    directory, records = found[EXPORTED]
    model = AutoModelForSequenceClassification.from_pretrained(directory / "model")
    pairs = load_preferences(
        data_source(source=str(root / "pairs.jsonl")), load_tokenizer(root / "model")
    )
    right = []
    for pair in pairs:
        with torch.no_grad():
            chosen, rejected = (
                model(torch.tensor([[*pair.prompt, *answer]])).logits.item()
                for answer in (pair.chosen, pair.rejected)
            )
        right.append(chosen > rejected)
    assert sum(right) / len(right) > 0.8, "the exported reward model is not the trained one"
    assert records[-1]["eval/held_out/accuracy"] > 0.9
