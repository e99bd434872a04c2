"""The figures of an RLHF run (see rlhf.sh) as one JSON object on the last line."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from spmdrl.atomic_files import finite_json
from spmdrl.observe.metrics import read_metrics

EVAL = "eval/held_out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="holds sft, reward_model and ppo")
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    pairs = [
        record
        for record in read_metrics(given.directory / "reward_model" / "metrics.jsonl")
        if f"{EVAL}/accuracy" in record
    ]
    steps = read_metrics(given.directory / "ppo" / "metrics.jsonl")
    drift = [record["kl_per_response"] for record in steps if "kl_per_response" in record]
    before, after = held_out_rewards(given.directory / "ppo" / "evaluation")
    summary = {
        "reward_model_accuracy": pairs[-1][f"{EVAL}/accuracy"],
        "reward_model_accuracy_error": pairs[-1][f"{EVAL}/standard_error"],
        "reward_before": statistics.mean(before.values()),
        "reward_after": statistics.mean(after.values()),
        "reward_error": error_of_difference(before, after),
        "kl": drift[-1],
        "seconds": given.seconds,
    }
    for stage in ("sft", "reward_model", "ppo"):
        print(f"{stage}: {given.directory / stage / 'report.html'}")
    print(finite_json(summary))


def held_out_rewards(directory: Path) -> tuple[dict[int, float], dict[int, float]]:
    """The mean reward of every held-out prompt, in the first and in the last evaluation."""
    files = sorted(directory.glob("held_out_*.jsonl"))
    first, last = (rewards_by_prompt(file) for file in (files[0], files[-1]))
    assert first.keys() == last.keys(), (files[0], files[-1])
    return first, last


def rewards_by_prompt(file: Path) -> dict[int, float]:
    rewards: dict[int, list[float]] = {}
    # not splitlines: texts may hold other characters that end lines
    for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        record = json.loads(line)
        rewards.setdefault(record["prompt_id"], []).append(record["reward"])
    return {prompt: statistics.mean(values) for prompt, values in rewards.items()}


def error_of_difference(before: dict[int, float], after: dict[int, float]) -> float:
    """The standard error of the mean difference; both are of the same prompts, so in pairs. One
    prompt has none.
    """
    gains = [after[prompt] - before[prompt] for prompt in before]
    return float(statistics.stdev(gains) / len(gains) ** 0.5) if len(gains) > 1 else math.nan


if __name__ == "__main__":
    main()
