"""Resuming, stopping, exporting, evaluating and generating, on real ranks with a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flow_cases import run_configs, write_config
from harness import run_ranks
from replay import assert_same_samples
from saved_runs import CLOCKS
from spmdrl.commands.evaluate import evaluate, generate
from spmdrl.config.load import load_config
from spmdrl.models.files.hf import open_checkpoint
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    make_tiny_model(root / "model")
    return root


def same_but_for_time(a: dict[str, float], b: dict[str, float]) -> bool:
    return {k: v for k, v in a.items() if not k.startswith(CLOCKS)} == {
        k: v for k, v in b.items() if not k.startswith(CLOCKS)
    }


def test_a_resumed_run_equals_an_uninterrupted_one(root):
    whole = write_config(root / "whole.yaml", root / "model", root / "whole", steps=4)
    parts = write_config(
        root / "parts.yaml", root / "model", root / "parts", steps=4, checkpoint={"every": 1}
    )
    stop_at = [f"environment={Path(__file__).parents[1] / 'stopping.py'}:StopAfterTwo"]
    runs = [(str(whole), []), (str(parts), stop_at), (str(parts), [])]
    run_ranks(run_configs, 2, runs, str(root), timeout_s=200)
    expected = [r for r in read_metrics(root / "whole" / "metrics.jsonl") if "loss" in r]
    found = [r for r in read_metrics(root / "parts" / "metrics.jsonl") if "loss" in r]
    assert len(expected) == len(found) == 4
    for a, b in zip(expected, found, strict=True):
        assert same_but_for_time(a, b), a["step"]


@pytest.mark.full
def test_a_folded_run_resumes_unfolded_and_the_other_way_round(root, tmp_path):
    roles = {"policy": {"tp": 2}, "reference": {"tp": 2}, "rollout": {"tp": 2}}
    config = write_config(
        tmp_path / "tp2.yaml",
        root / "model",
        tmp_path / "parts",
        environment="replay:ReplayEnvironment",
        roles=roles,
        algorithm={"kl_coef": 0.1},
    )
    whole = [(str(config), [f"run_dir={tmp_path / 'whole'}"])]
    (expected,) = run_ranks(run_configs, 2, whole, str(tmp_path), timeout_s=200)[0]
    for steps, (ranks, fold) in enumerate(((2, "false"), (1, "true"), (2, "false")), start=1):
        words = [f"steps={steps}", f"fold={fold}"]
        (found,) = run_ranks(run_configs, ranks, [(str(config), words)], str(tmp_path))[0]
    assert [record["step"] for record in found] == [1, 2, 3]
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        for metric in ("loss", "grad_norm", "ref_kl", "entropy", "reward"):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4, abs=1e-6), (step, metric)
        assert_same_samples(tmp_path, "parts", step)


@pytest.mark.full  # tests/checkpoint has every pair
def test_a_checkpoint_continues_on_another_layout(root):
    config = write_config(
        root / "layout.yaml", root / "model", root / "layout", steps=2, checkpoint={"every": 1}
    )
    first = [(str(config), ["roles.policy.dp_shard=2"])]
    run_ranks(run_configs, 2, first, str(root), timeout_s=200)
    records = run_ranks(run_configs, 1, [(str(config), ["steps=3"])], str(root))[0][0]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert records[2]["rollout_gap_max"] < 1e-4


def test_the_exported_model_is_the_trained_one(root):
    config = write_config(
        root / "export.yaml", root / "model", root / "export", checkpoint={"export": True}
    )
    run_ranks(run_configs, 2, [(str(config), ["roles.policy.tp=2"])], str(root), timeout_s=200)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "export" / "model")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    begun = open_checkpoint(root / "model")
    assert open_checkpoint(root / "export" / "model").names == begun.names


def serve(world: World, path: str, prompts: str, out: str) -> tuple[dict[str, float], int]:
    config = load_config(path)
    with start_reward_server() as server:
        metrics = evaluate(config, world, server)
    return metrics, generate(config, world, prompts, out)


FOLDED = {"fold": True, "roles": {"policy": {"ranks": "0-3"}, "rollout": {"ranks": "4-7", "tp": 4}}}


@pytest.mark.parametrize(("ranks", "sections"), [(1, {}), (2, {}), (2, FOLDED)])
def test_eval_and_generate(root, ranks, sections):
    config = write_config(
        root / f"serve_{ranks}.yaml",
        root / "model",
        root / f"serve_{ranks}",
        **sections,
        evaluation={"held_out": 5, "num_samples": 4, "k": [1, 4], "threshold": 1.0},
    )
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(3)))
    out = root / f"answers_{ranks}.jsonl"
    result, count = run_ranks(serve, ranks, str(config), str(prompts), str(out))[0]
    assert count == 12
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(a["prompt_id"], a["sample"]) for a in answers] == [
        (prompt, sample) for prompt in range(3) for sample in range(4)
    ]
    assert all(a["tokens"] > 0 and a["logprob"] < 0 for a in answers)
    assert 0 <= result["eval/held_out/accuracy"] <= result["eval/held_out/pass@4"] <= 1
    assert result["eval/held_out/pass@1"] == pytest.approx(result["eval/held_out/accuracy"])
    if ranks == 2:
        other = (root / "answers_1.jsonl").read_text().splitlines()
        assert [json.loads(x)["response"] for x in other] == [a["response"] for a in answers]
