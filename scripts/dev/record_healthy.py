"""Metrics of healthy runs, which tests/observe/test_healthy.py shows to all detectors.

    scripts/quickstart.sh
    scripts/examples/rlhf.sh --data PAIRS --out OUT
    scripts/examples/dpo.sh --data PAIRS --out OUT2
    scripts/examples/tools.sh --out OUT3
    python scripts/dev/record_healthy.py quickstart=runs/quickstart-* sft=OUT/sft ppo=OUT/ppo ...

Each run's metrics.jsonl becomes tests/observe/healthy/NAME.jsonl: every line and metric, with six
digits of a number. runs.json beside them says what was run: flow, steps, ranks, commit, versions.
A run is healthy if it did what its example is for: what was measured must be better at its end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spmdrl.config.load import last_start
from spmdrl.observe.metrics import read_metrics

FOLDER = Path(__file__).parents[2] / "tests" / "observe" / "healthy"


def record(name: str, run: Path) -> dict[str, Any]:
    """Write a run's metrics; returns its entry of runs.json."""
    records = read_metrics(run / "metrics.jsonl")
    lines = [json.dumps({key: short(value) for key, value in one.items()}) for one in records]
    (FOLDER / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    start = last_start(run)
    return {
        "flow": start["config"]["flow"],
        "steps": int(records[-1]["step"]),
        "ranks": start["ranks"],
        "commit": start["commit"],
        "versions": {key: start["versions"][key] for key in ("spmdrl", "torch")},
    }


def short(value: float) -> float | int:
    """Round to six digits; a whole number stays whole."""
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep the metrics of healthy runs for the tests.")
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    file = FOLDER / "runs.json"
    entries = json.loads(file.read_text()) if file.is_file() else {}
    for name, _, run in (word.partition("=") for word in parser.parse_args().runs):
        entries[name] = record(name, Path(run))
    file.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
