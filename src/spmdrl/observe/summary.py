"""The end of a run: report.png, the paths of its files, and one line of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from spmdrl.atomic_files import finite_json
from spmdrl.observe import names
from spmdrl.observe.drawing import Records
from spmdrl.observe.metrics import METRICS_FILE, TENSORBOARD_DIR, read_metrics
from spmdrl.observe.panels import evaluations
from spmdrl.observe.report import write_report


def report(run_dir: str, *, model: str, seconds: float | None = None) -> None:
    """Draw the report and print a summary; its last line is one JSON object.

    Args:
        seconds: wall time to state, by default the sum of the steps' seconds.

    Raises:
        ValueError: the run has no metrics yet.
    """
    directory = Path(run_dir)
    if not (directory / METRICS_FILE).is_file():
        raise ValueError(f"{directory / METRICS_FILE} is not there: has the run started?")
    records = read_metrics(directory / METRICS_FILE)
    picture = write_report(directory, run_name=directory.name, model=Path(model).name)
    trained = [r for r in records if names.STEP_SECONDS in r]
    sets = held_out_results(records)
    for name, found in sets.items():
        for quantity, (values, error) in found.items():
            shown = _arrow(values) if quantity != "win rate" else f"{values[-1]:.3f}"
            print(f"{name}: {quantity} {shown} (standard error {error:.3f})")
    result = summary_of_sets(sets)
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
    print(finite_json(result))


Found = Mapping[str, tuple[Sequence[float], float]]
"""One set's results: quantity -> its values in order of steps, and the last standard error."""

QUANTITIES = {
    "accuracy": names.ACCURACY,
    "win rate": names.WIN_RATE,
    "reward": "/reward",
    "nll": "/nll",
    "margin": "/margin",
}


def held_out_results(records: Records) -> Mapping[str, Found]:
    """Results of every held-out set, by its name."""
    found: dict[str, dict[str, tuple[list[float], float]]] = {}
    for quantity, suffix in QUANTITIES.items():
        for name, points in evaluations(records, suffix).items():
            values = [point[1] for point in points]
            found.setdefault(name, {})[quantity] = (values, points[-1][2])
    return found


def summary_of_sets(sets: Mapping[str, Found]) -> dict[str, object]:
    """Entries of the last line for the sets: at the top those of `held_out` or of the only set, and
    under `sets` each one's if there are several.
    """
    told = {name: _told(found) for name, found in sets.items()}
    result: dict[str, object] = {"sets": told} if len(told) > 1 else {}
    first = next(iter(told.values()), {}) if len(told) == 1 else told.get("held_out", {})
    return {**result, **first}


def _told(found: Found) -> dict[str, float]:
    told: dict[str, float] = {}
    for quantity, (values, error) in found.items():
        if quantity == "win rate":
            told |= {"win_rate": values[-1], "win_rate_error": error}
            continue
        told |= _first_and_last(quantity, values)
        told["standard_error" if quantity == "accuracy" else f"{quantity}_error"] = error
    return told


def _first_and_last(quantity: str, values: Sequence[float]) -> dict[str, float]:
    """The first value as `before` (unless it is the only one), the last as `after`."""
    first = {f"{quantity}_before": values[0]} if len(values) > 1 else {}
    return {**first, f"{quantity}_after": values[-1]}


def _arrow(values: Sequence[float]) -> str:
    return " -> ".join(f"{values[i]:.3f}" for i in sorted({0, len(values) - 1}))
