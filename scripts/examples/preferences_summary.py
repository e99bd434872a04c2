"""The figures of dpo.sh or online_dpo.sh as one JSON object on the last line."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from spmdrl.atomic_files import finite_json
from spmdrl.observe.metrics import read_metrics

PAIRS, ANSWERS = "eval/pairs", "eval/answers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run_dir of the last stage")
    parser.add_argument("--judge", type=Path, help="run_dir of the judge, where it was trained")
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    records = read_metrics(given.run / "metrics.jsonl")
    evaluations = [record for record in records if f"{PAIRS}/margin" in record]
    first, last = evaluations[0], evaluations[-1]
    before, after = rewards(given.run / "evaluation")
    gains = [after[prompt] - before[prompt] for prompt in before]
    summary = {
        "margin_before": first[f"{PAIRS}/margin"],
        "margin_after": last[f"{PAIRS}/margin"],
        "margin_error": last[f"{PAIRS}/margin/standard_error"],
        "accuracy_before": first[f"{PAIRS}/accuracy"],
        "accuracy_after": last[f"{PAIRS}/accuracy"],
        "accuracy_error": last[f"{PAIRS}/standard_error"],
        "win_rate": last[f"{ANSWERS}/win_rate"],
        "win_rate_error": last[f"{ANSWERS}/win_rate/standard_error"],
        "reward_before": first[f"{ANSWERS}/reward"],
        "reward_after": last[f"{ANSWERS}/reward"],
        "reward_error": error_of_mean(gains),
        "response_length_before": first[f"{ANSWERS}/response_length"],
        "response_length_after": last[f"{ANSWERS}/response_length"],
        **judge(given.judge),
        "seconds": given.seconds,
    }
    print(f"report:       {given.run / 'report.html'}")
    print(finite_json(summary))


def error_of_mean(gains: Sequence[float]) -> float:
    """One prompt has none."""
    return statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.nan


def rewards(directory: Path) -> tuple[Mapping[int, float], Mapping[int, float]]:
    """The mean reward of the responses to each held-out prompt, at first and at last."""
    files = sorted(directory.glob("answers_*.jsonl"))
    before, after = (by_prompt(file) for file in (files[0], files[-1]))
    assert before.keys() == after.keys(), (files[0], files[-1])
    return before, after


def by_prompt(file: Path) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    # not splitlines: texts may hold other characters that end lines
    for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        record = json.loads(line)
        found.setdefault(record["prompt_id"], []).append(record["reward"])
    return {prompt: statistics.mean(values) for prompt, values in found.items()}


def judge(directory: Path | None) -> dict[str, float]:
    """The judge's accuracy on pairs held out from its own half."""
    if directory is None or not (directory / "metrics.jsonl").is_file():
        return {}
    name = "eval/held_out"
    records = [r for r in read_metrics(directory / "metrics.jsonl") if f"{name}/accuracy" in r]
    last = records[-1]
    return {
        "judge_accuracy": last[f"{name}/accuracy"],
        "judge_accuracy_error": last[f"{name}/standard_error"],
    }


if __name__ == "__main__":
    main()
