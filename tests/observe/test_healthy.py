"""Detectors say nothing of real runs that learned (kept by scripts/dev/record_healthy.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spmdrl.observe.detectors import Detecting, replay
from spmdrl.observe.metrics import merge_steps, read_metrics

FOLDER = Path(__file__).parent / "healthy"
RUNS = sorted(path.stem for path in FOLDER.glob("*.jsonl"))

CONTROL = "tools_without"
"""The control of the example on tools: without its tool no answer is right."""

EXAMPLES = {
    *("dpo", "quickstart", "rlhf_sft", "rlhf_reward_model", "rlhf_ppo"),
    *("tools", "tools_sft", CONTROL),
}

READ = {
    "grpo": {"reward_std", "groups_with_signal", "entropy", "ratio", "clip_fraction", "lr"},
    "ppo": {"ref_kl", "value/explained_variance", "ratio", "reward_std", "cut_fraction"},
    "dpo": {"loss", "lr", "skipped", "seconds/step"},
}
"""Metrics that some step of a flow's run must have, or its detectors would have seen nothing."""


def test_there_is_a_run_of_every_example_and_all_are_small() -> None:
    described = json.loads((FOLDER / "runs.json").read_text())
    assert sorted(described) == RUNS
    assert set(RUNS) >= EXAMPLES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1e6
    for name in RUNS:
        records = merge_steps(read_metrics(FOLDER / f"{name}.jsonl"))
        assert records[-1]["step"] == described[name]["steps"] >= 6, name
        has = {key for record in records for key in record}
        assert name == CONTROL or READ.get(described[name]["flow"], set()) <= has, name


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_said_of_a_healthy_run(name: str) -> None:
    records = merge_steps(read_metrics(FOLDER / f"{name}.jsonl"))
    looking = Detecting()
    told = [(int(r["step"]), found.name) for r in records for found in looking.look(r)]
    assert told == ([(3, "flat_reward")] if name == CONTROL else [])
    assert [(e.first, e.finding.name) for e in replay(records)] == told
