"""What a step trains on and what it leaves alone: refilled groups, value warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ppo_layouts import settings

from flow_cases import run_layouts
from replay import Rows, assert_same_samples, read_samples
from spmdrl.algorithms.rewards import has_signal
from spmdrl.observe.metrics import read_metrics
from tiny_model import make_tiny_model

REFILLED = {
    "environment": "replay:ReplayEnvironment",
    "data": {"group_size": 2},
    "algorithm": {"refill_attempts": 4},
}


@pytest.fixture(scope="module")
def refilled(tmp_path_factory) -> tuple[Mapping[str, Any], Path]:
    """Groups of two, of which half have no signal, with draws for those."""
    root = tmp_path_factory.mktemp("refills")
    make_tiny_model(root / "model")
    return run_layouts(root, {1: {"one": []}, 2: {"two": []}}, **REFILLED), root


def with_signal(rows: Rows) -> list[bool]:
    columns = {n: torch.stack([row[n] for row in rows.values()]) for n in ("rewards", "prompt_ids")}
    return has_signal(columns["rewards"], columns["prompt_ids"]).tolist()


def test_groups_without_signal_are_refilled(refilled):
    records, root = refilled
    drawn = [record["groups"] for record in records["one"]]
    assert max(drawn) > 5, "no group was ever dead: the test shows nothing"
    for step, record in enumerate(records["one"]):
        rows = read_samples(root, "one", step)
        alive = with_signal(rows)
        assert all(alive), step
        # five are wanted; only what four further draws could not fill may be missing
        assert len(alive) == min(5, record["groups_with_signal"]), step
        assert record["samples"] == 2 * record["groups"]
    assert any(len(with_signal(read_samples(root, "one", step))) == 5 for step in range(3))


def test_refills_are_the_same_on_two_ranks(refilled):
    records, root = refilled
    assert [r["groups"] for r in records["two"]] == [r["groups"] for r in records["one"]]
    assert_same_samples(root, "two")


def test_value_warm_up_trains_the_value_alone(tmp_path):
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "scalar", seed=1, head="score")
    given = settings(tmp_path, environment=None)
    given["algorithm"] |= {"value_warmup_steps": 2}
    run_layouts(tmp_path, {1: {"one": []}}, **given)
    records = read_metrics(tmp_path / "one" / "metrics.jsonl")
    assert ["loss" in record for record in records] == [False, False, True]
    assert all(record["value/grad_norm"] > 0 for record in records)
    assert [record["update_tokens"] > 0 for record in records] == [False, False, True]
    # the policy is still the reference, and its samples' version its own
    assert [record["kl_per_response"] for record in records] == pytest.approx([0.0] * 3, abs=1e-6)
    assert [record["sample_lag"] for record in records] == [0.0] * 3
