"""The report's panels, and the choice of those that fit the recorded metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spmdrl.observe import names
from spmdrl.observe.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PHASE_COLOURS,
    Records,
    curve,
    frame,
    from_zero,
    line,
    series,
)

Draw = Callable[[Any, Records], None]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A drawing, available if all the metrics that it needs were recorded.

    Args:
        of_sets: quantity that some held-out set must have, whatever the set's name.
    """

    needs: tuple[str, ...]
    draw: Draw
    of_sets: str | None = None

    def fits(self, records: Records) -> bool:
        if self.of_sets is not None and not evaluations(records, self.of_sets):
            return False
        return all(series(records, name)[1] for name in self.needs)


def choose(panels: tuple[Panel, ...], records: Records, count: int) -> list[Draw]:
    """The first `count` panels that fit and, if there are too few, others, which draw no data."""
    fitting = [panel for panel in panels if panel.fits(records)]
    rest = [panel for panel in panels if panel not in fitting]
    return [panel.draw for panel in (*fitting, *rest)][:count]


def evaluations(
    records: Records, quantity: str = names.ACCURACY
) -> dict[str, list[tuple[int, float, float]]]:
    """Evaluations of each held-out set: (step, value, standard error or 0) in order of steps."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(names.EVAL) and name.endswith(quantity):
                prefix = name.removesuffix(quantity)
                own = "" if quantity == names.ACCURACY else quantity
                error = record.get(prefix + own + names.STANDARD_ERROR, 0.0)
                if not math.isfinite(value):
                    continue
                point = (int(record["step"]), value, error)
                found.setdefault(prefix.removeprefix(names.EVAL), []).append(point)
    return found


def _reward(axes: Any, records: Records) -> None:
    drawn = curve(axes, records, names.REWARD, BLUE)
    frame(axes, "Training reward", "mean reward of a step", drawn=drawn)
    from_zero(axes, drawn=drawn)


def _kl(axes: Any, records: Records) -> None:
    """KL to the reference and of a step's move; logarithmic if both were recorded."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    to_reference = curve(axes, records, names.REF_KL, ORANGE, "to the reference")
    moved = any(series(records, names.KL)[1])  # all 0 when every step is one on-policy update
    if moved:
        curve(axes, records, names.KL, BLUE, "within a step")
    frame(axes, "KL divergence", "nats per token", drawn=to_reference or moved)
    if not (to_reference or moved):
        return
    logarithmic = moved and any(value > 0 for value in series(records, names.REF_KL)[1])
    if logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    from_zero(axes, drawn=not logarithmic)
    low, high = axes.get_ylim()  # and room for the legend above
    axes.set_ylim(low, high * (high / low) ** 0.25 if logarithmic else high + (high - low) / 4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", ncols=2, columnspacing=1.2, borderaxespad=0.2)


def _accuracy(axes: Any, records: Records) -> None:
    """Draw bars of before and after, or curves if a set was evaluated more than twice."""
    from matplotlib.ticker import PercentFormatter

    found = evaluations(records)
    frame(axes, "Held-out accuracy", "accuracy ± standard error", drawn=bool(found), x_label=None)
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


def _win_rates(axes: Any, records: Records) -> None:
    """Win rates against the opponent's responses over the steps; 0.5 means equally good."""
    from matplotlib.ticker import PercentFormatter

    found = evaluations(records, names.WIN_RATE)
    for (name, points), colour in zip(found.items(), (GREEN, *PHASE_COLOURS), strict=False):
        steps, values, errors = (list(column) for column in zip(*points, strict=True))
        style = {"marker": "o", "markersize": 6, "capsize": 4, "linewidth": 1.8}
        axes.errorbar(steps, values, errors, color=colour, label=name, **style)
        axes.annotate(
            f"{100 * values[-1]:.0f} %",
            (steps[-1], values[-1] + errors[-1]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
    frame(axes, "Win rate", "against the opponent ± standard error", drawn=bool(found))
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    axes.set_ylim(0, 1.08)
    axes.margins(x=0.2)
    axes.legend(loc="lower right")


def _phases(axes: Any, records: Records) -> None:
    """Seconds per phase, stacked for each step."""
    timed = [r for r in records if names.STEP_SECONDS in r]
    phases = list(dict.fromkeys(name for r in timed for name in names.phases(r)))
    frame(axes, "Time per step", "seconds", drawn=bool(phases))
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
    rollout = curve(axes, records, names.TOKENS_PER_S + names.ROLLOUT, BLUE, "rollout")
    train = curve(axes, records, names.TOKENS_PER_S + names.UPDATE, ORANGE, "update")
    frame(axes, "Throughput", "tokens per second", drawn=rollout or train)
    if rollout or train:
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")


def _line_of(name: str, title: str, label: str) -> Draw:
    return lambda axes, records: line(axes, records, name, title, label)


def _held_out(name: str, title: str, label: str) -> Draw:
    """A drawing of a held-out quantity over the steps, with standard errors."""

    def draw(axes: Any, records: Records) -> None:
        full, error = f"{HELD_OUT}{name}", f"{HELD_OUT}{name}{names.STANDARD_ERROR}"
        steps, values = series(records, full)
        errors = [r.get(error, 0.0) for r in records if full in r][: len(values)]
        if values:
            axes.errorbar(
                steps,
                values,
                errors,
                color=GREEN,
                marker="o",
                markersize=6,
                capsize=4,
                linewidth=1.8,
            )
            for step, value in ((steps[0], values[0]), (steps[-1], values[-1])):
                axes.annotate(
                    f"{value:.2f}",
                    (step, value),
                    xytext=(0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontweight="bold",
                )
            axes.margins(x=0.15, y=0.3)
        frame(axes, title, label, drawn=bool(values))

    return draw


def _drift(axes: Any, records: Records) -> None:
    drawn = curve(axes, records, "kl_per_response", ORANGE)
    frame(axes, "KL to the reference", "nats per response", drawn=drawn)


HELD_OUT = f"{names.EVAL}held_out"

MAIN = (
    Panel(needs=(names.REWARD,), draw=_reward),
    Panel(needs=("pairs", "loss"), draw=_line_of("loss", "Training loss", "per pair")),
    Panel(needs=("nll",), draw=_line_of("nll", "Training loss", "nats per response token")),
    Panel(needs=("loss",), draw=_line_of("loss", "Training loss", "per row")),
)
"""Candidates for the large panel: the objective of the training."""

HELD = (
    Panel(needs=(), draw=_win_rates, of_sets=names.WIN_RATE),
    Panel(
        needs=("score", f"{HELD_OUT}/reward"),
        draw=_held_out("/reward", "Held-out reward", "mean ± standard error"),
    ),
    Panel(
        needs=(f"{HELD_OUT}/nll",),
        draw=_held_out("/nll", "Held-out loss", "nats per token ± standard error"),
    ),
    Panel(needs=(), draw=_accuracy),
)
"""Candidates for the panel of the held-out set."""

DETAILS = (
    Panel(needs=("kl_per_response",), draw=_drift),
    Panel(
        needs=("value/explained_variance",),
        draw=_line_of("value/explained_variance", "Value model", "explained variance"),
    ),
    Panel(needs=("accuracy",), draw=_line_of("accuracy", "Training accuracy", "share of pairs")),
    Panel(needs=("margin",), draw=_line_of("margin", "Margin", "chosen less rejected score")),
    Panel(needs=(names.LENGTH,), draw=_line_of(names.LENGTH, "Response length", "tokens")),
    Panel(needs=(names.KL,), draw=_kl),
    Panel(needs=(names.ENTROPY,), draw=_line_of(names.ENTROPY, "Entropy", "nats per token")),
    Panel(needs=("grad_norm",), draw=_line_of("grad_norm", "Gradient", "norm before clipping")),
    Panel(needs=("lr",), draw=_line_of("lr", "Learning rate", "per optimizer step")),
    Panel(
        needs=(names.PEAK_MEMORY,), draw=_line_of(names.PEAK_MEMORY, "Peak memory", "GB per rank")
    ),
)
"""Candidates for the row of three small panels: the first three that were recorded."""

TIMES: tuple[Draw, Draw] = (_phases, _speed)
