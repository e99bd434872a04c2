"""The end of a run: report.png, where everything is, and one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spmdrl.observe import names
from spmdrl.observe.drawing import series
from spmdrl.observe.metrics import METRICS_FILE, TENSORBOARD_DIR, read_metrics
from spmdrl.observe.panels import HELD_OUT, evaluations
from spmdrl.observe.report import write_report


def report(run_dir: str, *, model: str, seconds: float | None = None) -> None:
    """Draw the report and print a summary whose last line is one JSON object.

    Args:
        seconds: wall time to state; None: the sum of the steps' seconds.

    Raises:
        ValueError: the run has no metrics yet.
    """
    directory = Path(run_dir)
    if not (directory / METRICS_FILE).is_file():
        raise ValueError(f"{directory / METRICS_FILE} is not there: has the run started?")
    records = read_metrics(directory / METRICS_FILE)
    picture = write_report(directory, run_name=directory.name, model=Path(model).name)
    trained = [r for r in records if names.STEP_SECONDS in r]
    result: dict[str, object] = {}
    for name, points in evaluations(records).items():
        values, error = [point[1] for point in points], points[-1][2]
        result |= {**_first_and_last("accuracy", values), "standard_error": error}
        print(f"{name}: accuracy {_arrow(values)} (standard error {error:.3f})")
    for name, points in evaluations(records, names.WIN_RATE).items():
        _, value, error = points[-1]
        result |= {"win_rate": value, "win_rate_error": error}
        print(f"{name}: win rate {value:.3f} (standard error {error:.3f})")
    for name, quantity in ((HELD_OUT, "reward"), (HELD_OUT, "nll"), (HELD_OUT, "margin")):
        _, values = series(records, f"{name}/{quantity}")
        _, errors = series(records, f"{name}/{quantity}{names.STANDARD_ERROR}")
        if values:
            result |= _first_and_last(quantity, values)
            error = errors[-1] if errors else float("nan")
            print(f"held out: {quantity} {_arrow(values)} (standard error {error:.3f})")
    if seconds is None:
        seconds = sum(r[names.STEP_SECONDS] for r in trained)
    result |= {
        "steps": len(trained),
        "seconds": round(seconds, 1),
        "model_dir": str(directory / "model") if (directory / "model").is_dir() else None,
        "report": str(picture),
    }
    print(f"curves:       {picture}")
    print(f"TensorBoard:  tensorboard --logdir {directory / TENSORBOARD_DIR}")
    if (directory / "model").is_dir():
        print(f"model:        {directory / 'model'}")
    print(json.dumps(result))


def _first_and_last(quantity: str, values: Sequence[float]) -> dict[str, float]:
    """A run that evaluates at its end alone has no `before`."""
    first = {f"{quantity}_before": values[0]} if len(values) > 1 else {}
    return {**first, f"{quantity}_after": values[-1]}


def _arrow(values: Sequence[float]) -> str:
    return " -> ".join(f"{values[i]:.3f}" for i in sorted({0, len(values) - 1}))
