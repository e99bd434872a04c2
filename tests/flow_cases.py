"""Configurations and rank functions of the flow tests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from harness import run_ranks
from replay import DIRECTORY
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World

TASK = "reasoning_gym:chain_sum"


def questions(path: Path, count: int = 40) -> dict[str, Any]:
    """A `data` section whose sums come from a file: no package makes them."""
    rows = [{"question": f"What is {i} + {7 * i}?", "answer": str(8 * i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": {"source": str(path), "max_tokens": 96}}


def write_config(path: Path, model: Path, run_dir: Path, /, **sections: Any) -> Path:
    """A small GRPO configuration; `sections` are merged into it one level deep."""
    content: dict[str, Any] = {
        "flow": "grpo",
        "steps": 3,
        "seed": 3,
        "run_dir": str(run_dir),
        "model": {"path": str(model)},
        "roles": {"policy": {}, "rollout": {}},
        "data": {
            "prompts_per_step": 5,
            "group_size": 4,
            "train": {"source": TASK, "size": 40, "max_tokens": 96},
        },
        # every other answer is rewarded: signal without a model that can add
        "rewards": [{"function": f"{Path(__file__).parent / 'toy_rewards.py'}:even_length"}],
        "sampling": {"max_tokens": 10},
        "train": {"lr": 1e-3, "microbatch_tokens": 300},
        "log": {"tensorboard": False, "progress": False},
        "checkpoint": {"export": False},
    }
    for name, section in sections.items():
        merged = isinstance(section, dict) and isinstance(content.get(name), dict)
        content[name] = {**content[name], **section} if merged else section
    path.write_text(yaml.safe_dump(content))
    return path


def run_configs(
    world: World, configs: list[tuple[str, list[str]]], replay: str
) -> list[list[dict[str, float]]]:
    """Run configurations one after another on these ranks; the metrics of each."""
    os.environ[DIRECTORY] = replay
    results = []
    with start_reward_server() as server:
        for path, overrides in configs:
            config = load_config(path, overrides)
            train(config, world, server)
            records = read_metrics(Path(config.run_dir) / "metrics.jsonl")
            results.append([r for r in records if "loss" in r])
    return results


def run_layouts(
    root: Path, layouts: Mapping[int, Mapping[str, list[str]]], prefix: str = "", **sections: Any
) -> dict[str, list[dict[str, float]]]:
    """Layout name -> metrics of a run with these overrides on so many ranks. The first run of one
    rank records its samples in `root`, the others replay them (`replay`); the run of a layout has
    the directory `root / f"{prefix}{name}"`.
    """
    found = {}
    for size, words in layouts.items():
        configs = []
        for name, overrides in words.items():
            path = root / f"{prefix}{name}.yaml"
            write_config(path, root / "model", root / f"{prefix}{name}", **sections)
            configs.append((str(path), overrides))
        answers = run_ranks(run_configs, size, configs, str(root), timeout_s=400)
        found |= dict(zip(words, answers[0], strict=True))
    return found
