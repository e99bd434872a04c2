"""Steps of this project's flows, as peers.py and adapters.py time them: each in its own process."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REWARD = f"{HERE / 'step_reward.py'}:spread"
"""A reward that differs within every group, whatever the model says."""


def timed(words: Sequence[str], run_dir: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train with overrides of grpo_step.yaml.

    Returns:
        The figures of the steps after the first, and the metrics of all steps.
    """
    from spmdrl.commands.train import train
    from spmdrl.config.load import load_config
    from spmdrl.observe.metrics import read_metrics
    from spmdrl.rewards.server import start_reward_server
    from spmdrl.world import start_world, stop_world

    with start_reward_server() as server:
        config = load_config(HERE / "grpo_step.yaml", [f"run_dir={run_dir}", *words])
        world = start_world(device=config.device)
        train(config, world, server)
        stop_world()
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]
    figures = {
        "seconds": statistics.median(r["seconds/step"] for r in records[1:]),
        "tokens": statistics.median(num_tokens(r) for r in records[1:]),
        "gb": records[-1]["memory/peak_sum_gb"],
        "rows": statistics.median(num_rows(r) for r in records[1:]),
        "updates": sum(r["skipped"] == 0 and r["no_gradient"] == 0 for r in records),
        "dtype": config.model.dtype,
    }
    return figures, records


def num_rows(record: Mapping[str, float]) -> float:
    """Samples of a step, or both responses of its pairs."""
    return record["samples"] if "samples" in record else 2 * record["pairs"]


def num_tokens(record: Mapping[str, float]) -> float:
    """Tokens of prompts and responses of a step's rows; a prompt counts in each of its rows."""
    return num_rows(record) * (record["lengths/prompt"] + record["lengths/response"])
