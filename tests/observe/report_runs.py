"""Directories of runs, written by hand, for tests of reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import zstandard

from spmdrl.observe.metrics import MetricsWriter


def record(step: int, num_steps: int) -> dict[str, float]:
    done = step / num_steps
    return {
        "reward": done,
        "response_length": 50 - 20 * done,
        "kl": 1e-4 * (1 + done),
        "ref_kl": 0.01 * done,
        "entropy": 1 - done / 2,
        "groups": 8.0,
        "tokens_per_s/rollout": 900.0,
        "tokens_per_s/update": 1500.0,
        "memory/peak_gb": 2.5,
        "memory/parts_gb/rollout": 1.5,
        "memory/parts_gb/update": 2.0,
        "seconds/rollout": 2.0,
        "seconds/other": 0.1,
        "seconds/update": 1.5,
        "seconds/step": 3.6,
    }


def make_run(
    run: Path,
    num_steps: int,
    *,
    evaluated: Mapping[int, Mapping[str, float]] | None = None,
    starts: Sequence[Mapping[str, Any]] = (),
    changed: Mapping[int, Mapping[str, float]] | None = None,
    seconds_per_step: float = 3.6,
) -> Path:
    """Write a run's directory.

    Args:
        evaluated: step -> set -> accuracy.
        starts: entries of run.json; none writes no file. Steps follow the first one's time.
        changed: step -> metrics that replace the usual ones.
    """
    began = 1.7e9
    if starts and "started" in starts[0]:
        began = datetime.fromisoformat(starts[0]["started"]).timestamp()
    with MetricsWriter(run, is_first=True) as metrics:
        for step in range(num_steps + 1):
            values = record(step, num_steps) if step else {}
            for name, accuracy in (evaluated or {}).get(step, {}).items():
                values[f"eval/{name}/accuracy"] = accuracy
                values[f"eval/{name}/standard_error"] = 0.02
            values |= (changed or {}).get(step, {})
            if values:
                metrics.write(step, values, wall_time=began + (step + 0.5) * seconds_per_step)
    if starts:
        content = json.dumps({"version": 1, "starts": starts})
        (run / "run.json").write_text(content, encoding="utf-8")
    return run


def write_rollouts(run: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the samples of a step as its only rank's file."""
    file = run / "rollouts" / f"step_{step:06d}" / "rank_0000.jsonl.zst"
    file.parent.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(zstandard.compress(text.encode()))
