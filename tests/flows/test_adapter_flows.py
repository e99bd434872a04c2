"""Every shipped flow trains an adapter: it learns, and its export is a PEFT directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_sft_and_reward_model import write, write_pairs

from adapter_cases import make_peft
from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.models.config import read_config
from spmdrl.models.files.peft import read_adapter
from spmdrl.models.sharding import Head
from spmdrl.observe.metrics import read_metrics
from tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

LORA = {"adapter": {"rank": 4}}
LR = {"lr": 1e-2, "microbatch_tokens": 300}
PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sft": ("sft", {"policy": LORA}, {}),
    "reward_model": ("reward_model", {"reward": {"head": "normal", "trained": True, **LORA}}, {}),
    "dpo": (
        "dpo",
        {"policy": LORA, "reference": {"base": "policy"}},
        {"preference": {"beta": 0.2}},
    ),
    "kto": (
        "dpo",
        {"policy": LORA, "reference": {"base": "policy"}},
        {"preference": {"loss": "kto", "beta": 0.2}},
    ),
}
"""Flows over pairs: name -> flow, roles, sections."""


def sampled(root: Path) -> dict[str, dict[str, Any]]:
    """Sections of the flows that sample."""
    judge = {"kind": "reward", "base": "policy", "adapter": {"path": str(root / "judge")}}
    return {
        "grpo": {"roles": {"policy": LORA, "rollout": {}, "reference": {"base": "policy"}}}
        | {"algorithm": {"kl_coef": 0.01}},
        "distill": {
            "roles": {"policy": LORA, "rollout": {}, "teacher": {"model": str(root / "other")}}
        }
        | {"algorithm": {"teacher_coef": 1.0}},
        "online_dpo": {
            "flow": "online_dpo",
            "roles": {
                "policy": LORA,
                "rollout": {},
                "reference": {"base": "policy"},
                "judge": judge,
            },
            "rewards": [{"role": "judge"}],
            "preference": {"beta": 0.1},
        },
    }


NAMES = (*PAIRS, "grpo", "distill", "online_dpo")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter_flows")
    make_tiny_model(root / "model")
    make_tiny_model(root / "other", seed=1)
    make_peft(root / "judge", root / "model", head="score")
    write_pairs(root / "pairs.jsonl")
    configs = [
        str(write(root, name, flow, roles, train={**LR, "num_minibatches": 2}, **sections))
        for name, (flow, roles, sections) in PAIRS.items()
    ]
    data = {**questions(root / "rows.jsonl"), "prompts_per_step": 5, "group_size": 4}
    export = {"export": True}
    for name, sections in sampled(root).items():
        path, steps = root / f"{name}.yaml", 6
        given = {"data": data, "train": LR, "checkpoint": export, "steps": steps, **sections}
        configs.append(str(write_config(path, root / "model", root / name, **given)))
    run_ranks(run_configs, 2, [(path, []) for path in configs], str(root), timeout_s=400)
    return root


def values(root: Path, name: str, metric: str) -> list[float]:
    records = read_metrics(root / name / "metrics.jsonl")
    return [record[metric] for record in records if metric in record]


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_exported_that_has_learned(root: Path, name: str) -> None:
    model = read_config(root / "model")
    head: Head = "score" if name == "reward_model" else "lm"
    adapter = read_adapter(root / name / "model", model, head=head)
    assert {own.rank for own in adapter.targets.values()} == {4}
    tensors = load_file(root / name / "model" / "adapter_model.safetensors")
    learned = [key for key, tensor in tensors.items() if "lora_B" in key and tensor.any()]
    assert len(learned) == len(adapter.targets), "B is 0 before an update"


@pytest.mark.full
def test_flows_over_pairs_learn(root: Path) -> None:
    nll = values(root, "sft", "eval/held_out/nll")
    assert nll[-1] < nll[0] - 0.2
    for name in ("reward_model", "dpo"):
        accuracy = values(root, name, "eval/held_out/accuracy")
        assert accuracy[-1] > max(0.8, accuracy[0]), name
    margin = values(root, "kto", "eval/held_out/margin")
    assert margin[0] == pytest.approx(0, abs=1e-6), "B is 0 at first"
    assert margin[-1] > 0.01


def test_flows_that_sample_learn(root: Path) -> None:
    reference = values(root, "grpo", "ref_kl")
    assert reference[0] == pytest.approx(0, abs=1e-6) and reference[-1] > 1e-4
    teacher = values(root, "distill", "teacher_kl")
    assert teacher[-1] < teacher[0]
    assert any(norm > 0 for norm in values(root, "online_dpo", "grad_norm"))
