"""Charts as inline SVG: one metric over the steps, a line for each run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spmdrl.observe.report.curves import Series, is_shown, smooth, text_of, thinned
from spmdrl.observe.report.markup import Markup, joined, tag

WIDTH, HEIGHT = 320, 160
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
"""Margins around the lines, for the numbers at the axes."""

FEW = 20
"""Number of values below which each is a dot, and nothing is smoothed."""

LARGE = 1000.0
"""Ratio of the largest value to the one above a tenth of them that makes the axis logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Range of values on a side of a chart, and its places in the picture."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = (math.log10(max(v, self.low)) for v in (value, low, high))
        share = (value - low) / (high - low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self, count: int) -> list[float]:
        """Round numbers within the range, about `count` of them."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            every = math.ceil(len(powers) / count) or 1
            return [10.0**power for power in powers[::every]]
        size = _round_up((self.high - self.low) / count)
        first = math.ceil(self.low / size - 1e-9)
        last = math.floor(self.high / size + 1e-9)
        return [number * size for number in range(first, last + 1)]


def _round_up(size: float) -> float:
    unit = 10.0 ** math.floor(math.log10(size))
    return next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= size * 0.999)


def value_axis(values: Sequence[float], bars: Sequence[float] = ()) -> Axis:
    """Make the axis of finite values: from 0 where they are positive, unless they differ little;
    logarithmic where they differ much, and then not much below the least tenth of them.

    Args:
        bars: ends of error bars, which are seen too where the axis is not logarithmic.
    """
    low, high = min(values), max(values)
    begin, end = HEIGHT - BOTTOM, TOP
    usual = sorted(values)[len(values) // 10]
    if low > 0 and high / usual > LARGE:
        low, high = max(low, usual / LARGE), max((high, *bars))
        return Axis(low=low, high=high, begin=begin, end=end, logarithmic=True)
    low, high = min((low, *bars)), max((high, *bars))
    if 0 <= low < 0.7 * high:
        low = 0.0
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    low = low if low == 0 else low - margin
    return Axis(low=low, high=high + margin, begin=begin, end=end)


def step_axis(steps: Sequence[float]) -> Axis:
    low, high = min(steps), max(steps)
    extra = 0.5 if low == high else 0.0
    return Axis(low=low - extra, high=high + extra, begin=LEFT, end=WIDTH - RIGHT)


def chart(
    name: str, about: str, lines: Sequence[Series], *, label: str, marks: Sequence[int], most: int
) -> Markup:
    """Draw a metric as a figure.

    Args:
        name: name of the metric.
        about: its meaning and unit; "" where it is not known.
        lines: a series for each run that recorded it.
        label: unique id of the figure.
        marks: steps at which a run resumed.
        most: number of points that a line may have.
    """
    caption = tag(
        "figcaption",
        tag("span", tag("code", name), f" {about}" if about else None),
        tag("span", _last_values(lines), class_="readout", aria_live="polite"),
    )
    values = [v for line in lines for v in line.values if is_shown(v)]
    if not values:
        none = tag("p", "No value is finite.", class_="none")
        return tag("figure", caption, none, class_="chart", data_name=name)
    x = step_axis([step for line in lines for step in line.steps])
    y = value_axis(values, [v for line in lines for v in _with_errors(line)])
    described = f"{label}-title {label}-text"
    picture = tag(
        "svg",
        tag("title", f"{name} by step", id=f"{label}-title"),
        tag("desc", _description(lines, y), id=f"{label}-text"),
        _frame(x, y),
        *(_mark(x.place(step)) for step in marks if x.low <= step <= x.high),
        *(_drawn(line, x, y, most) for line in lines),
        tag("line", class_="cursor", y1=TOP, y2=HEIGHT - BOTTOM, visibility="hidden"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=described,
    )
    # page.js moves the cursor: it needs the values, and the steps' places
    points = [_points(line, most) for line in lines]
    plot = tag("div", picture, class_="plot", data_x=f"{x.low} {x.high} {x.begin} {x.end}")
    data = json.dumps(points, separators=(",", ":"))
    return tag("figure", caption, plot, class_="chart", data_name=name, data_lines=data)


def _with_errors(line: Series) -> list[float]:
    ends = (
        (v - line.error(i), v + line.error(i)) for i, v in enumerate(line.values) if is_shown(v)
    )
    return [end for pair in ends for end in pair]


def _frame(x: Axis, y: Axis) -> Markup:
    parts = []
    for value in y.ticks(4):
        at = y.place(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        text = tag("text", text_of(value), x=LEFT - 5, y=at + 3.5, text_anchor="end")
        parts.append(text)
    whole = [step for step in x.ticks(4) if step == int(step)] or [round(x.low)]
    for step in whole:
        place = min(max(x.place(step), LEFT + 4), WIDTH - RIGHT - 6)
        text = tag("text", f"{step:.0f}", x=place, y=HEIGHT - 7, text_anchor="middle")
        parts.append(text)
    return tag("g", *parts, class_="axes")


def _mark(place: float) -> Markup:
    return tag("line", x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM, class_="resumed")


def _drawn(line: Series, x: Axis, y: Axis, most: int) -> Markup:
    def place(step: float, value: float) -> str:
        return f"{x.place(step)} {y.place(value)}"

    kept = thinned(line.values, most)
    steps, values = [line.steps[i] for i in kept], [line.values[i] for i in kept]
    finite = line.finite()
    few = len(finite) < FEW
    parts = [tag("path", d=_path(steps, values, place), class_="thin" if not few else "line")]
    if few:
        parts += [tag("circle", cx=x.place(s), cy=y.place(v), r=2.4) for s, v in finite]
    else:
        course = smooth([value for _, value in finite])
        every = math.ceil(2 * len(course) / most) or 1
        own = [*range(0, len(course) - 1, every), len(course) - 1]
        at, means = [finite[i][0] for i in own], [course[i] for i in own]
        parts.append(tag("path", d=_path(at, means, place), class_="line"))
    if line.errors is not None and few:
        parts.append(tag("path", d=_bars(line, x, y), class_="error"))
    return tag("g", *parts, class_=f"run{line.run}")


def _path(
    steps: Sequence[float], values: Sequence[float], place: Callable[[float, float], str]
) -> str:
    """Words of a path with gaps at values that are not finite."""
    words, move = [], "M"
    for step, value in zip(steps, values, strict=True):
        if not is_shown(value):
            move = "M"
            continue
        words.append(f"{move}{place(step, value)}")
        move = "L"
    return "".join(words)


def _bars(line: Series, x: Axis, y: Axis) -> str:
    words = []
    for i, (step, value) in enumerate(zip(line.steps, line.values, strict=True)):
        error = line.error(i)
        if error > 0 and is_shown(value):
            at, low, high = x.place(step), y.place(value - error), y.place(value + error)
            words.append(f"M{at} {low}L{at} {high}M{at - 3} {low}h6M{at - 3} {high}h6")
    return "".join(words)


def _points(line: Series, most: int) -> dict[str, object]:
    kept = thinned(line.values, most)
    values = [_short(line.values[i]) for i in kept]
    points: dict[str, object] = {"r": line.run, "x": [line.steps[i] for i in kept], "y": values}
    if line.errors is not None:
        points["e"] = [_short(line.error(i)) for i in kept]
    return points


def _short(value: float) -> float | str:
    return float(f"{value:.4g}") if is_shown(value) else text_of(value)


def _last_values(lines: Sequence[Series]) -> str:
    """Text after the name until a step is pointed at."""
    if len(lines) > 1:
        return ""
    return f"step {lines[0].steps[-1]:.0f}: {text_of(lines[0].values[-1])}"


def _description(lines: Sequence[Series], y: Axis) -> str:
    texts = [_course(line) for line in lines]
    if len(lines) > 1:
        numbered = zip(lines, texts, strict=True)
        texts = [f"Run {line.run + 1}: {text}" for line, text in numbered]
    return " ".join(texts) + (" Logarithmic axis." if y.logarithmic else "")


def _course(line: Series) -> str:
    points = line.finite()
    if not points:
        return "No value is finite."
    values = [value for _, value in points]
    (first, begin), (last, end) = points[0], points[-1]
    text = (
        f"{text_of(begin)} at step {first:.0f}, {text_of(end)} at step {last:.0f}; "
        f"from {text_of(min(values))} to {text_of(max(values))}."
    )
    gaps = len(line.values) - len(points)
    return text + f" {gaps} values are not finite." * (gaps > 0)


def legend(names: Sequence[str]) -> Markup:
    """Show the runs' names with the lines that they have in every chart."""
    items = []
    for run, name in enumerate(names):
        line = tag("path", d="M0 5L34 5", class_="line")
        sample = tag(
            "svg", tag("g", line, class_=f"run{run}"), viewBox="0 0 34 10", aria_hidden="true"
        )
        items.append(tag("li", sample, f"{run + 1}. {name}"))
    return tag("ul", joined(*items), class_="legend", aria_label="Runs")
