"""KTO's z has the unit of what the loss compares. (Of a report that `length_normalise` compared
nats per token with a z in nats per response.)
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_dpo_layouts import write_dpo
from test_sft_and_reward_model import write_pairs

from flow_cases import run_configs
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.distributed.reduce import gather_objects
from spmdrl.flows.dpo import DpoTrainer
from spmdrl.flows.held_out_preferences import log_ratio
from spmdrl.observe.metrics import read_metrics
from spmdrl.run.protocols import Metrics
from spmdrl.run.run import Run
from tiny_model import make_tiny_model


class KeepingTrainer:
    """Keeps the log-ratios of the answers to other prompts, and their tokens."""

    def __init__(self, run: Run) -> None:
        self.run, self.inner = run, DpoTrainer(run)
        self.held_out = self.inner.held_out

    def step(self, step: int, batch: Batch) -> Metrics:
        assert self.inner.others is not None
        others = self.inner.others.batch(step)
        ratio = log_ratio(self.inner.policy, self.inner.reference, others)
        tokens = others.row_sum(others["loss_mask"])
        parts = gather_objects((ratio.tolist(), tokens.tolist()))
        if self.run.world.is_first:
            torch.save(parts, self.run.directory / "drift.pt")
        return self.inner.step(step, batch)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kto")
    make_tiny_model(root / "model", seed=2)
    make_tiny_model(root / "other")
    write_pairs(root / "pairs.jsonl")
    configs = []
    for normalise in ("true", "false"):
        words = ["steps=1", f"preference.length_normalise={normalise}", "evaluation.held_out=0"]
        path = write_dpo(root, normalise, "kto")
        configs.append((str(path), [*words, f"trainer={Path(__file__)}:KeepingTrainer"]))
    run_ranks(run_configs, 2, configs, str(root))
    return root


@pytest.mark.parametrize("normalise", ["true", "false"])
def test_z_is_in_the_units_of_the_loss(root, normalise):
    parts = torch.load(root / normalise / "drift.pt")
    ratio, tokens = (torch.tensor([x for part in parts for x in part[i]]).double() for i in (0, 1))
    assert len(set(tokens.tolist())) > 1, "lengths differ"
    wanted = (ratio / tokens if normalise == "true" else ratio).mean().item()
    assert wanted > 0, "else z is 0 in any unit"
    (record,) = (r for r in read_metrics(root / normalise / "metrics.jsonl") if "loss" in r)
    assert record["kl_baseline"] == pytest.approx(wanted, rel=1e-5)
