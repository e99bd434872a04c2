"""Figures of tools.sh: whether fine-tuning is enough, and those of the whole run as one JSON object
on the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spmdrl.atomic_files import finite_json
from spmdrl.observe.metrics import read_metrics
from spmdrl.turns.tools import ToolEnvironment

ACCURACY = "eval/held_out/accuracy"
CALL = "<tool_call>"
ENOUGH = 0.4
"""Held-out accuracy at which fine-tuning stops; GRPO is to do the rest."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["enough", "figures"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    given = parser.parse_args()
    if given.what == "enough":
        accuracy = accuracies(given.directory / "evaluation")[-1]
        print(f"tools.sh: {accuracy:.0%} of held-out questions are answered with the tool")
        return 0 if accuracy >= ENOUGH else 1
    before, after = accuracies(given.directory / "grpo")
    (without,) = accuracies(given.directory / "grpo_without")
    files = sorted((given.directory / "grpo" / "evaluation").glob("held_out_*.jsonl"))
    rows = [list(records(file)) for file in (files[0], files[-1])]
    summary = {
        "accuracy_sft": before,
        "accuracy_after": after,
        "accuracy_without_tool": without,
        "standard_error": error_of_difference(*map(answered, rows)),
        "valid_calls": valid_calls(rows[-1]),
        "seconds": given.seconds,
    }
    print(f"grpo: {given.directory / 'grpo' / 'report.html'}")
    print(finite_json(summary))
    return 0


def accuracies(directory: Path) -> list[float]:
    """Held-out accuracies in the order of their measurement."""
    found = read_metrics(directory / "metrics.jsonl")
    return [record[ACCURACY] for record in found if ACCURACY in record]


def records(file: Path) -> Iterator[Mapping[str, Any]]:
    for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        yield json.loads(line)


def answered(rows: list[Mapping[str, Any]]) -> dict[int, float]:
    """Whether each held-out question, which has one sample, is answered: 0 or 1."""
    return {row["prompt_id"]: float(row["reward"] >= 1) for row in rows}


def error_of_difference(before: dict[int, float], after: dict[int, float]) -> float:
    """The standard error of the mean difference; both are of the same questions, so in pairs."""
    gains = [after[prompt] - before[prompt] for prompt in before]
    mean = sum(gains) / len(gains)
    spread = sum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1)
    return math.sqrt(spread / len(gains))


def valid_calls(rows: list[Mapping[str, Any]]) -> float:
    """Share of the samples' calls that the calculator answers: they run again."""
    tools = ToolEnvironment(["calculator"], "hermes")
    calls = [part for row in rows for part in row["response"].split(CALL)[1:]]
    found = [tools.step(CALL + call).metrics for call in calls]
    return sum(counts["valid_calls"] for counts in found) / len(found) if found else math.nan


if __name__ == "__main__":
    sys.exit(main())
