"""report.png: a run on one page, drawn from its metrics.jsonl."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spmdrl.files import replace_file
from spmdrl.observe import names
from spmdrl.observe.metrics import METRICS_FILE, merge_steps, read_metrics

REPORT_FILE = "report.png"
INK, GREY, FAINT = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, GREEN, ORANGE = "#2b6cb0", "#2f855a", "#c05621"
PHASE_COLOURS = ("#2b6cb0", "#63b3ed", "#dd6b20", "#f6ad55", "#38a169", "#805ad5", "#d53f8c")
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the picture is the same everywhere
    "font.size": 10,
    "text.parse_math": False,  # a "$" in a run's name is a "$"
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

Records = Sequence[Mapping[str, float]]


def write_report(run_dir: Path, *, run_name: str, model: str, out: Path | None = None) -> Path:
    """Draw the run's report; the picture replaces an older one as a whole.

    Args:
        run_dir: holds metrics.jsonl, with the names of `observe.names`.
        run_name, model: for the title.
        out: None: `run_dir`/report.png.

    Returns:
        The picture's path.

    Raises:
        ValueError: metrics.jsonl holds no step, or a malformed line.
        FileNotFoundError: no metrics.jsonl.
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
        _reward(figure.add_subplot(grid[0, :4]), records)
        _accuracy(figure.add_subplot(grid[0, 4:]), records)
        _line(figure.add_subplot(grid[1, :2]), records, names.LENGTH, "Response length", "tokens")
        _kl(figure.add_subplot(grid[1, 2:4]), records)
        _line(figure.add_subplot(grid[1, 4:]), records, names.ENTROPY, "Entropy", "nats per token")
        _phases(figure.add_subplot(grid[2, :4]), records)
        _speed(figure.add_subplot(grid[2, 4:]), records)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=130, facecolor="white")
    path = Path(run_dir) / REPORT_FILE if out is None else Path(out)
    replace_file(path, picture.getvalue())
    return path


def summary(records: Records) -> str:
    """One line on the run: steps, time, reward and peak memory, as far as recorded."""
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


def series(records: Records, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that hold a finite value of `name`."""
    points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the values, over what there is of it at both ends."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def evaluations(records: Records) -> dict[str, list[tuple[int, float, float]]]:
    """Held-out sets by name: (step, accuracy, standard error or 0) in order of steps."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(names.EVAL) and name.endswith(names.ACCURACY):
                prefix = name.removesuffix(names.ACCURACY)
                error = record.get(prefix + names.STANDARD_ERROR, 0.0)
                if not math.isfinite(value):
                    continue
                point = (int(record["step"]), value, error)
                found.setdefault(prefix.removeprefix(names.EVAL), []).append(point)
    return found


def _curve(axes: Any, records: Records, name: str, colour: str, label: str | None = None) -> bool:
    """Raw values faint, their smoothed course over them; False when there are none."""
    steps, values = series(records, name)
    if not values:
        return False
    few = len(values) < 20
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=1.6 if few else 1,
        alpha=1 if few else 0.3,
        marker="o" if few else None,
        markersize=4,
        label=label if few else None,
    )
    if not few:
        axes.plot(steps, smooth(values), color=colour, linewidth=2.2, label=label)
    return True


def _frame(axes: Any, title: str, label: str, *, drawn: bool, x_label: str | None = "step") -> None:
    """Title, labels and whole-numbered steps; says so where nothing was recorded."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, pad=8)
    axes.set_ylabel(label)
    if x_label is not None:
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(
            MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1)
        )
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
        axes.set_xticks([])


def _reward(axes: Any, records: Records) -> None:
    drawn = _curve(axes, records, names.REWARD, BLUE)
    _frame(axes, "Training reward", "mean reward of a step", drawn=drawn)
    _from_zero(axes, drawn=drawn)


def _line(axes: Any, records: Records, name: str, title: str, label: str) -> None:
    drawn = _curve(axes, records, name, BLUE)
    _frame(axes, title, label, drawn=drawn)
    _from_zero(axes, drawn=drawn)


def _from_zero(axes: Any, *, drawn: bool) -> None:
    """Let the axis begin at 0 where all values are positive, so that heights compare."""
    if drawn and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)


def _kl(axes: Any, records: Records) -> None:
    """KL to the reference and of a step's move: logarithmic where both are there."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    to_reference = _curve(axes, records, names.REF_KL, ORANGE, "to the reference")
    moved = any(series(records, names.KL)[1])  # all 0 when every step is one on-policy update
    if moved:
        _curve(axes, records, names.KL, BLUE, "within a step")
    _frame(axes, "KL divergence", "nats per token", drawn=to_reference or moved)
    if not (to_reference or moved):
        return
    logarithmic = moved and any(value > 0 for value in series(records, names.REF_KL)[1])
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    _from_zero(axes, drawn=not logarithmic)
    low, high = axes.get_ylim()  # and room for the legend above
    axes.set_ylim(low, high * (high / low) ** 0.25 if logarithmic else high + (high - low) / 4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", ncols=2, columnspacing=1.2, borderaxespad=0.2)


def _accuracy(axes: Any, records: Records) -> None:
    """Bars of before and after, or curves when a set was evaluated more than twice."""
    from matplotlib.ticker import PercentFormatter

    found = evaluations(records)
    _frame(axes, "Held-out accuracy", "accuracy ± standard error", drawn=bool(found), x_label=None)
    if not found:
        return
    if max(len(points) for points in found.values()) > 2:
        _accuracy_curves(axes, found)
    else:
        _accuracy_bars(axes, found)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])


def _accuracy_bars(axes: Any, found: Mapping[str, list[tuple[int, float, float]]]) -> None:
    steps = sorted({point[0] for points in found.values() for point in points})
    colours = dict(zip(steps, (GREY, GREEN, *PHASE_COLOURS), strict=False))
    for group, points in enumerate(found.values()):
        for k, (step, value, error) in enumerate(points):
            x = group + 0.42 * (k - (len(points) - 1) / 2)
            axes.bar(x, value, width=0.36, color=colours[step], alpha=0.9)
            axes.errorbar(x, value, yerr=error, color=INK, capsize=5, linewidth=1.4)
            axes.annotate(
                f"{100 * value:.0f} %",
                (x, value + error),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=14 if len(found) == 1 else 9,
                fontweight="bold",
            )
    for k, (step, colour) in enumerate(colours.items()):
        when = f"step {step}"
        if len(steps) == 2:
            when = f"{'after' if k else 'before'} ({when})"
        axes.bar(0, 0, color=colour, label=when)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_xlim(-0.5, len(found) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, columnspacing=1.2)


def _accuracy_curves(axes: Any, found: Mapping[str, list[tuple[int, float, float]]]) -> None:
    colours = (GREEN, *PHASE_COLOURS * len(found))
    for (name, points), colour in zip(found.items(), colours, strict=False):
        steps, values, errors = (list(column) for column in zip(*points, strict=True))
        axes.errorbar(
            steps,
            values,
            errors,
            color=colour,
            marker="o",
            markersize=5,
            capsize=4,
            linewidth=1.8,
            label=f"{name}:  {100 * values[0]:.0f} → {100 * values[-1]:.0f} %",
        )
    axes.margins(x=0.08)
    axes.set_xlabel("step")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=min(2, len(found)),
        handlelength=1.2,
        columnspacing=1,
    )


def _phases(axes: Any, records: Records) -> None:
    """Seconds per phase, stacked by step."""
    timed = [r for r in records if names.STEP_SECONDS in r]
    phases = list(dict.fromkeys(name for r in timed for name in names.phases(r)))
    _frame(axes, "Time per step", "seconds", drawn=bool(phases))
    if not phases:
        return
    phases = [p for p in phases if p != names.OTHER] + [names.OTHER] * (names.OTHER in phases)
    steps = [r["step"] for r in timed]
    total = sum(r[names.STEP_SECONDS] for r in timed)
    bottom = [0.0] * len(steps)
    for k, name in enumerate(phases):
        values = [r.get(names.SECONDS + name, 0.0) for r in timed]
        top = [low + value for low, value in zip(bottom, values, strict=True)]
        look = {
            "color": "#cbd2d9" if name == names.OTHER else PHASE_COLOURS[k % len(PHASE_COLOURS)],
            "label": f"{name}  {100 * sum(values) / max(total, 1e-9):.0f} %",
        }
        if len(steps) <= 120:
            axes.bar(steps, values, bottom=bottom, width=0.9, **look)
        else:  # bars would be thinner than a pixel
            axes.fill_between(steps, bottom, top, step="mid", linewidth=0, **look)
        bottom = top
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, max(bottom) * 1.05 or 1)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.24),
        ncols=7,
        columnspacing=1.2,
        handlelength=1,
        handletextpad=0.5,
    )


def _speed(axes: Any, records: Records) -> None:
    rollout = _curve(axes, records, names.TOKENS_PER_S + names.ROLLOUT, BLUE, "rollout")
    train = _curve(axes, records, names.TOKENS_PER_S + names.UPDATE, ORANGE, "update")
    _frame(axes, "Throughput", "tokens per second", drawn=rollout or train)
    if rollout or train:
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"
