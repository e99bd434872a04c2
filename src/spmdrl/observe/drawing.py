"""Colours, curves and frames of the report's drawings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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


def series(records: Records, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that hold a finite value of `name`."""
    points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the values; near both ends, over as many as exist."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def curve(axes: Any, records: Records, name: str, colour: str, label: str | None = None) -> bool:
    """Draw values, from 20 on faintly under their smoothed course; False if there are none."""
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


def frame(axes: Any, title: str, label: str, *, drawn: bool, x_label: str | None = "step") -> None:
    """Set title, labels and whole-numbered steps; write "not recorded" if nothing was drawn."""
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


def line(axes: Any, records: Records, name: str, title: str, label: str) -> None:
    drawn = curve(axes, records, name, BLUE)
    frame(axes, title, label, drawn=drawn)
    from_zero(axes, drawn=drawn)


def from_zero(axes: Any, *, drawn: bool) -> None:
    """Let the axis begin at 0 if all values are positive, so that heights can be compared."""
    if drawn and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
