"""The report of a run and the comparison of several: the page, and what the terminal shows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from spmdrl.atomic_files import finite_json, replace_file
from spmdrl.observe import names
from spmdrl.observe.report.contents import Contents, read_run
from spmdrl.observe.report.curves import Records, series_of
from spmdrl.observe.report.evaluations import QUANTITIES, results
from spmdrl.observe.report.page import page
from spmdrl.observe.report.starts import differences
from spmdrl.observe.trackers.tensorboard import TENSORBOARD_DIR

REPORT_FILE = "report.html"

MOST_RUNS = 8
"""Runs on a page: so many colours and dashes can be told apart."""

COMPARED_SAMPLES = 2
"""Samples of each kind and run that a comparison shows."""

Found = Mapping[str, tuple[Mapping[float, float], float]]
"""One set's results: quantity -> its values by their steps, ascending, and the last standard error.
"""


def report(
    run_dir: Path, *, model: str | None = None, seconds: float | None = None
) -> dict[str, object]:
    """Write the run's report and print a summary; its last line is one JSON object, returned.

    Args:
        model: model to name if run.json does not.
        seconds: wall time to state, by default the sum of the steps' seconds.

    Raises:
        ValueError: the directory is no run's, or its metrics.jsonl is malformed.
    """
    run = read_run(run_dir, model=model)
    path = run_dir / REPORT_FILE
    write_page(path, [run])
    sets = held_out_results(run.records)
    for name, found in sets.items():
        for quantity, (values, error) in found.items():
            told = list(values.values())
            shown = _arrow(told) if quantity != "win rate" else f"{told[-1]:.3f}"
            print(f"{name}: {quantity} {shown} (standard error {error:.3f})")
    for episode in run.episodes:
        print(f"step {episode.first}: {episode.finding.name}: {episode.finding.text}")
    trained = [r for r in run.records if names.STEP_SECONDS in r]
    if seconds is None:
        seconds = sum(r[names.STEP_SECONDS] for r in trained)
    peaks = [value for _, value in _points(run, names.PEAK_SUM)]
    exported = run_dir / "model"
    result = summary_of_sets(sets) | {
        "steps": len(trained),
        "seconds": round(seconds, 1),
        "peak_gb": round(peaks[-1], 2) if peaks else None,
        "model_dir": str(exported) if exported.is_dir() else None,
        "report": str(path),
    }
    print(f"report:       {path}")
    print(f"TensorBoard:  tensorboard --logdir {run_dir / TENSORBOARD_DIR}")
    if exported.is_dir():
        print(f"model:        {exported}")
    print(finite_json(result))
    return result


def compare(run_dirs: Sequence[Path], path: Path) -> None:
    """Write a page on several runs side by side, and print the keys that differ.

    Raises:
        ValueError: fewer than two runs or more than `MOST_RUNS`, one of them twice, or as for a
            report.
    """
    real = [directory.resolve() for directory in run_dirs]
    if not 2 <= len(set(real)) == len(real) <= MOST_RUNS:
        raise ValueError(f"compare takes 2 to {MOST_RUNS} runs, each once; it has {len(run_dirs)}")
    labels = labels_of(real)
    runs = [
        read_run(directory, name=label, samples=COMPARED_SAMPLES)
        for directory, label in zip(run_dirs, labels, strict=True)
    ]
    write_page(path, runs)
    for key, values in differences([run.config for run in runs if run.config]).items():
        print(f"{key}: {' | '.join('default' if v is None else v for v in values)}")
    print(f"comparison:   {path}")


def write_page(path: Path, runs: Sequence[Contents]) -> None:
    """Write the page; it replaces an older one as a whole."""
    text = page(runs, time.strftime("%Y-%m-%d %H:%M:%S"))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode("utf-8", "replace"), lasting=False)


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Name runs by the ends of their paths, as short as they differ."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise AssertionError(paths)


def held_out_results(records: Records) -> Mapping[str, Found]:
    """Find the results of every held-out set, by its name; values that are not finite are none."""
    sets = results(records)
    found: dict[str, dict[str, tuple[dict[float, float], float]]] = {}
    for quantity, suffix in QUANTITIES.items():
        for name, own in sets.items():
            series = own.get(suffix.removeprefix("/"))
            if series is None or series.errors is None:
                continue
            whole = zip(series.steps, series.values, series.errors, strict=True)
            points = [point for point in whole if math.isfinite(point[1])]
            if points:
                values = {step: value for step, value, _ in points}
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
            told |= {"win_rate": list(values.values())[-1], "win_rate_error": error}
            continue
        told |= _first_and_last(quantity, values)
        told["standard_error" if quantity == "accuracy" else f"{quantity}_error"] = error
    return told


def _first_and_last(quantity: str, values: Mapping[float, float]) -> dict[str, float]:
    """The first value as `before` (unless it is the only one of trained weights), the last of
    trained weights as `after`.
    """
    steps = list(values)
    told = {f"{quantity}_before": values[steps[0]]} if len(steps) > 1 or steps[0] == 0 else {}
    return told | ({f"{quantity}_after": values[steps[-1]]} if steps[-1] > 0 else {})


def _arrow(values: Sequence[float]) -> str:
    return " -> ".join(f"{values[i]:.3f}" for i in sorted({0, len(values) - 1}))


def _points(run: Contents, name: str) -> list[tuple[float, float]]:
    series = series_of(run.records, name)
    return [] if series is None else series.finite()
