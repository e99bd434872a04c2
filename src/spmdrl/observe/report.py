"""The report of a run: report.png, drawn on one page from its metrics.jsonl, the paths of its
files, and one line of JSON.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from spmdrl.atomic_files import finite_json, replace_file
from spmdrl.observe import names
from spmdrl.observe.drawing import GREY, STYLE, Records, series
from spmdrl.observe.metrics import METRICS_FILE, merge_steps, read_metrics
from spmdrl.observe.panels import DETAILS, HELD, MAIN, TIMES, choose, evaluations
from spmdrl.observe.trackers.tensorboard import TENSORBOARD_DIR

REPORT_FILE = "report.png"


def write_report(run_dir: Path, *, run_name: str, model: str, out: Path | None = None) -> Path:
    """Draw the run's report; the picture replaces an older one as a whole.

    Args:
        run_dir: directory with metrics.jsonl, whose names are those of `observe.names`.
        run_name, model: names for the title.
        out: path of the picture, `run_dir`/report.png by default.

    Returns:
        The picture's path.

    Raises:
        ValueError: metrics.jsonl holds no step, or a malformed line.
        FileNotFoundError: metrics.jsonl does not exist.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = merge_steps(read_metrics(Path(run_dir) / METRICS_FILE))
    if not records:
        raise ValueError(f"{Path(run_dir) / METRICS_FILE} holds no step yet: nothing to report")
    with matplotlib.rc_context(STYLE):
        # a Figure of its own, not pyplot's: no global state and no display
        layout = ConstrainedLayoutEngine(
            w_pad=0.12, h_pad=0.12, hspace=0.04, wspace=0.03, rect=(0, 0, 1, 0.925)
        )
        figure = Figure(figsize=(12, 9.5), layout=layout)
        title = f"{run_name}  ·  {model}"
        size = min(17, 1150 / len(title))  # within the page
        figure.text(0.014, 0.962, title, fontsize=size, fontweight="bold")
        figure.text(0.014, 0.934, summary(records), color=GREY, fontsize=10.5)
        grid = figure.add_gridspec(3, 6, height_ratios=(1.35, 1, 1.15))
        places = (grid[0, :4], grid[0, 4:], *(grid[1, i : i + 2] for i in (0, 2, 4)))
        chosen = choose(MAIN, records, 1) + choose(HELD, records, 1) + choose(DETAILS, records, 3)
        for place, draw in zip((*places, grid[2, :4], grid[2, 4:]), (*chosen, *TIMES), strict=True):
            draw(figure.add_subplot(place), records)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=130, facecolor="white")
    path = Path(run_dir) / REPORT_FILE if out is None else Path(out)
    replace_file(path, picture.getvalue())
    return path


def summary(records: Records) -> str:
    """One line on the run: steps, time, reward and peak memory, as far as they were recorded."""
    trained = [r for r in records if names.STEP_SECONDS in r]
    count = len(trained) or len(records)
    parts = [f"{count} step{'s' * (count > 1)}"]
    seconds = sum(r[names.STEP_SECONDS] for r in trained)
    if trained:
        parts.append(f"{_duration(seconds)} ({seconds / len(trained):.1f} s per step)")
    _, rewards = series(records, names.REWARD)
    if rewards:
        ends = max(1, min(5, len(rewards) // 4))
        first, last = sum(rewards[:ends]) / ends, sum(rewards[-ends:]) / ends
        parts.append(f"reward {first:.2f} → {last:.2f}")
    _, memory = series(records, names.PEAK_MEMORY)
    if memory:
        parts.append(f"peak memory {max(memory):.1f} GB per rank")
    return "   ·   ".join(parts)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


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
    _, peaks = series(records, names.PEAK_SUM)
    result |= {
        "steps": len(trained),
        "seconds": round(seconds, 1),
        "peak_gb": round(peaks[-1], 2) if peaks else None,
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
