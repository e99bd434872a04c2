"""What is learned from data has the likelihood of the logits as they are: `sampling.temperature` is
the sampler's. (Of a report that SFT divided its logits by it.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_dpo_layouts import CLOCKS, LOSSES, write_dpo
from test_sft_and_reward_model import write, write_pairs
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from flow_cases import run_configs
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.flows.sft import SftTrainer
from spmdrl.observe.metrics import read_metrics
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from sweeps import asked, swept
from tiny_model import make_tiny_model

ROWS = "rows.pt"


class KeepingTrainer:
    """Keeps the rows of the step for the test."""

    def __init__(self, run: Run) -> None:
        self.run, self.inner = run, SftTrainer(run)

    def step(self, step: int, batch: Batch) -> Metrics:
        columns = {name: batch[name] for name in ("tokens", "loss_mask")}
        torch.save({"lengths": batch.lengths, **columns}, self.run.directory / ROWS)
        return self.inner.step(step, batch)


TEMPERATURES: dict[str, tuple[float, ...]] = {
    "sft": (1.0, 0.5, 2.5, 0.0),
    "reward_model": (1.0, 0.5),
    **dict.fromkeys(LOSSES, (1.0, 0.5)),
}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> tuple[Path, dict[tuple[str, float], list[dict[str, float]]]]:
    root = tmp_path_factory.mktemp("temperatures")
    make_tiny_model(root / "model")
    make_tiny_model(root / "other", seed=1)
    write_pairs(root / "pairs.jsonl")
    configs: dict[tuple[str, float], tuple[str, list[str]]] = {}
    for kind in {"sft"} | asked(request, "kind"):
        for temperature in TEMPERATURES[kind]:
            name = f"{kind}_{temperature}"
            words = ["steps=1", f"sampling.temperature={temperature}"]
            if kind in LOSSES:
                path = write_dpo(root, name, kind)
            elif kind == "sft":
                train: dict[str, Any] = {"lr": 1e-3, "microbatch_tokens": 90}
                path = write(root, name, "sft", {"policy": {}}, train=train)
                words.append(f"trainer={Path(__file__)}:KeepingTrainer")
            else:
                roles = {"reward": {"head": "normal", "trained": True}}
                path = write(root, name, "reward_model", roles)
            configs[kind, temperature] = (str(path), words)
    run_ranks(run_configs, 1, list(configs.values()), str(root), timeout_s=300)
    return root, {
        key: [
            {k: v for k, v in record.items() if not k.startswith(CLOCKS)}
            for record in read_metrics(root / f"{key[0]}_{key[1]}" / "metrics.jsonl")
        ]
        for key in configs
    }


@pytest.mark.parametrize("kind", swept(TEMPERATURES, ["sft", "reward_model", "dpo"]))
def test_offline_flows_do_not_read_the_samplers_temperature(runs, kind):
    plain, *others = (runs[1][kind, temperature] for temperature in TEMPERATURES[kind])
    assert any("loss" in record for record in plain)
    for other in others:
        assert other == plain


def test_the_loss_of_sft_is_cross_entropy(runs):
    root, records = runs
    model = AutoModelForCausalLM.from_pretrained(root / "model").double().eval()
    for temperature in TEMPERATURES["sft"]:
        rows = torch.load(root / f"sft_{temperature}" / ROWS)
        lengths = rows["lengths"].tolist()
        total, count = 0.0, 0
        for tokens, mask in zip(
            rows["tokens"].split(lengths), rows["loss_mask"].split(lengths), strict=True
        ):
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, :-1]
            read = mask[1:]
            total += cross_entropy(logits[read], tokens[1:][read], reduction="sum").item()
            count += int(read.sum())
        (loss,) = (r["loss"] for r in records["sft", temperature] if "loss" in r)
        assert loss == pytest.approx(total / count, rel=1e-5)
