"""report.png: a run on one page, drawn from its metrics.jsonl."""

from __future__ import annotations

import io
from pathlib import Path

from spmdrl.atomic_files import replace_file
from spmdrl.observe import names
from spmdrl.observe.drawing import GREY, STYLE, Records, series
from spmdrl.observe.metrics import METRICS_FILE, merge_steps, read_metrics
from spmdrl.observe.panels import DETAILS, HELD, MAIN, TIMES, choose

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
