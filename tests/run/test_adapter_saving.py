"""Checkpoints and exports of runs that train adapters: what they hold, and what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapter_cases import make_peft, shared_roles
from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.commands.evaluate import evaluate, generate
from spmdrl.config.load import load_config
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.resume_point import describe_roles
from spmdrl.world import World
from tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[5, 9, 200, 17, 30, 31]])


def config_of(root: Path, name: str, **sections: Any) -> str:
    given: dict[str, Any] = {
        "roles": {"policy": {"adapter": {"rank": 4}}, "rollout": {}},
        "data": {**questions(root / "rows.jsonl"), "prompts_per_step": 5, "group_size": 4},
        "train": {"lr": 2e-2, "microbatch_tokens": 300},
        "checkpoint": {"every": 2, "export": True, "export_as": "both"},
        **sections,
    }
    path = root / f"{name}.yaml"
    return str(write_config(path, root / "model", root / name, **given))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three steps on one rank, and of two in shards on two ranks, resumed for the third on
    one: `whole`, `parts`.
    """
    root = tmp_path_factory.mktemp("adapter_runs")
    make_tiny_model(root / "model")
    make_tiny_model(root / "other", seed=7)
    whole, parts = config_of(root, "whole"), config_of(root, "parts")
    sharded = ["roles.policy.dp_shard=2", "steps=2", "train.schedule=constant"]
    run_ranks(run_configs, 2, [(parts, sharded)], str(root), timeout_s=300)
    again = [(whole, ["train.schedule=constant"]), (parts, ["train.schedule=constant"])]
    run_ranks(run_configs, 1, again, str(root), timeout_s=300)
    return root


def losses(run_dir: Path) -> list[tuple[float, float]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def state(run_dir: Path) -> dict[str, Any]:
    root = run_dir / "checkpoints"
    path = root / (root / "latest").read_text()
    content: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
    return content


def test_a_run_resumes_on_another_layout(root: Path) -> None:
    whole, parts = losses(root / "whole"), losses(root / "parts")
    assert len(whole) == len(parts) == 3
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-6)


def test_checkpoints_hold_adapters_only_and_name_their_base(root: Path) -> None:
    content = state(root / "parts")
    names = {entry["name"] for entry in content["entries"]}
    assert names and all(".lora_" in name for name in names), names
    base = content["state"]["bases"]["policy"]
    assert base["path"] == str((root / "model").resolve()) and len(base["xxh3"]) == 16


def test_another_base_is_refused(root: Path) -> None:
    words = ["steps=4", f"model.path={root / 'other'}"]
    with pytest.raises(AssertionError, match=r"roles.policy: .* holds an adapter of .*/model .*"):
        run_ranks(run_configs, 1, [(str(root / "parts.yaml"), words)], str(root))


def logits(directory: Path, adapter: Path | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def test_peft_and_transformers_load_the_exports(root: Path) -> None:
    run = root / "parts"
    adapted, merged = logits(root / "model", run / "model_adapter"), logits(run / "model")
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (adapted - logits(root / "model")).abs().max() > 1e-2, "nothing was learned"
    described = json.loads((run / "model_adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (4, 32)
    before, after = (load_file(d / "model.safetensors") for d in (root / "model", run / "model"))
    embedding = "model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding])


def answer(world: World, config: str, root: str, cases: dict[str, list[str]]) -> dict[str, Any]:
    """Greedy responses, and the evaluation's metrics, by case."""
    found: dict[str, Any] = {}
    for name, words in cases.items():
        own = load_config(config, [f"run_dir={root}/eval_{name}", *words], trains=False)
        generate(own, world, f"{root}/rows.jsonl", f"{root}/{name}.jsonl")
        with start_reward_server() as server:
            metrics = evaluate(own, world, server)
        lines = Path(root, f"{name}.jsonl").read_text().splitlines()
        found[name] = ([json.loads(line)["response"] for line in lines], metrics)
    return found


@pytest.mark.full
def test_an_exported_adapter_is_evaluated_as_the_merged_model(root: Path) -> None:
    run = root / "parts"
    adapter = f"roles.policy.adapter={{path: {run / 'model_adapter'}}}"
    cases = {
        "adapter": [adapter],
        "merged_here": [adapter, "rollout.adapters=merged", "roles.rollout.tp=2"],
        "merged": [f"model.path={run / 'model'}"],
        "base": ["roles.policy.adapter=null"],
    }
    words = {"sampling": {"temperature": 0, "max_tokens": 10}, "evaluation": {"held_out": 8}}
    config = config_of(root, "evaluated", **words)
    found = run_ranks(answer, 2, config, str(root), cases)[0]
    assert found["adapter"] == found["merged_here"] == found["merged"]
    assert found["base"][0] != found["adapter"][0]


def test_an_exported_adapter_is_trained_further(root: Path) -> None:
    """An adapter from files is exported as it was, after a step that is too small to move it."""
    given = {"path": str(root / "parts" / "model_adapter")}
    roles = {"policy": {"adapter": given}, "rollout": {}}
    words = {"train": {"lr": 1e-30}, "checkpoint": {"export": True}, "steps": 1}
    config = config_of(root, "further", roles=roles, **words)
    run_ranks(run_configs, 1, [(config, [])], str(root), timeout_s=200)
    before, after = (
        load_file(d / "adapter_model.safetensors")
        for d in (root / "parts" / "model_adapter", root / "further" / "model")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.full
def test_roles_over_one_base_resume_on_another_layout(root: Path) -> None:
    """Each gives the means on fixed rows that it gave when it was saved (`LossCheck`)."""
    make_peft(root / "judge", root / "model", head="score", seed=1)
    words = {"flow": "ppo", "rewards": [{"role": "reward"}], "algorithm": {"kl_coef": 0.05}}
    config = config_of(root, "four", roles=shared_roles(root), steps=1, **words)
    run_ranks(run_configs, 1, [(config, [])], str(root), timeout_s=200)
    content = state(root / "four")
    assert content["state"]["bases"].keys() == {"policy", "value"}
    held = {(entry["group"], entry["name"]) for entry in content["entries"]}
    assert ("value.weights", "score.weight") in held
    assert all(".lora_" in name or name == "score.weight" for _, name in held)
    tp = [f"roles.{name}.tp=2" for name in shared_roles(root)]
    run_ranks(run_configs, 2, [(config, [*tp, "steps=2"])], str(root), timeout_s=200)
    assert len(losses(root / "four")) == 2


def test_calls_of_another_scale_are_not_those_of_this_one(root: Path) -> None:
    """A step that was stopped reuses no call that an adapter of another scale has made."""
    given = {
        key: describe_roles(load_config(config_of(root, "scaled"), words))["policy"]
        for key, words in {
            "same": [],
            "init": ["roles.policy.adapter.init=gaussian"],
            "alpha": ["roles.policy.adapter.alpha=64"],
            "rslora": ["roles.policy.adapter.rslora=true"],
        }.items()
    }
    assert given["same"] == given["init"]
    assert len({given[key] for key in ("same", "alpha", "rslora")}) == 3
