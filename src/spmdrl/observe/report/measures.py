"""Sections of a report with numbers: evaluation, curves, time and memory by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from spmdrl.observe import names
from spmdrl.observe.metrics import RESERVED
from spmdrl.observe.report.charts import FEW, chart
from spmdrl.observe.report.contents import Contents
from spmdrl.observe.report.curves import (
    TITLES,
    Series,
    grouped,
    is_constant,
    is_shown,
    series_of,
    text_of,
)
from spmdrl.observe.report.evaluations import results, set_and_quantity
from spmdrl.observe.report.markup import Child, Markup, tag
from spmdrl.observe.report.tables import Section, bar, details, section, table

Runs = Sequence[Contents]

POINTS, MOST, LEAST = 40_000, 240, 24
"""Points on a page, and in a line: a page stays small however long its runs are."""

MOST_CHARTS = 300
"""Charts on a page; further metrics are in the tables only."""

PARTS, DEVICE = "memory/parts_gb/", "memory/device_gb/"


def points_per_line(runs: Runs) -> int:
    lines = sum(len({name for record in run.records for name in record}) for run in runs)
    return max(LEAST, min(MOST, POINTS // max(lines, 1)))


def evaluation(runs: Runs) -> Section | None:
    """Show the results of held-out sets, with standard errors."""
    found = [results(run.records) for run in runs]
    sets = dict.fromkeys((name, key) for own in found for name, of in own.items() for key in of)
    if not sets:
        return None
    charts, rows, most = [], [], points_per_line(runs)
    for number, (name, key) in enumerate(sets):
        lines = [
            replace(own[name][key], run=run)
            for run, own in enumerate(found)
            if key in own.get(name, {})
        ]
        rows += [_result_row(runs, line, name, key) for line in lines]
        metric, marks = f"{names.EVAL}{name}/{key}", _marks(runs)
        label = f"evaluation-{number}"
        if any(len(line.values) > 1 for line in lines) or len(runs) > 1:
            charts.append(
                chart(metric, "± standard error", lines, label=label, marks=marks, most=most)
            )
    run = ["run"] if len(runs) > 1 else []
    head = ["set", "quantity", *run, "first", "last ± standard error", "largest", "smallest"]
    return section(
        "evaluation",
        "Evaluation",
        tag("div", *charts, class_="charts") if charts else None,
        table("Results of held-out sets", head, rows),
    )


def _result_row(runs: Runs, line: Series, name: str, key: str) -> list[Child]:
    points = line.finite() or [(line.steps[-1], line.values[-1])]
    error = line.error(len(line.values) - 1)
    last = text_of(line.values[-1]) + (f" ± {text_of(error)}" if error else "")
    ends = (max(points, key=lambda p: p[1]), min(points, key=lambda p: p[1]))
    cells = [
        f"{text_of(line.values[0])} (step {line.steps[0]:.0f})",
        f"{last} (step {line.steps[-1]:.0f})",
        *(f"{text_of(value)} (step {step:.0f})" for step, value in ends),
    ]
    return [name, key, *([runs[line.run].name] if len(runs) > 1 else []), *cells]


def _marks(runs: Runs) -> Sequence[int]:
    return runs[0].resumes if len(runs) == 1 else ()


def curves(runs: Runs) -> Section | None:
    """Show every metric over the steps, in groups; those that never change are listed."""
    elsewhere = _of_evaluation(runs)
    metrics = dict.fromkeys(n for run in runs for record in run.records for n in record)
    left = [n for n in metrics if n not in RESERVED and n not in elsewhere]
    if not left:
        return None
    parts, number, most = [], 0, points_per_line(runs)
    for group, members in grouped(left).items():
        charts, constant, rows = [], [], []
        for name in members:
            lines = [own for i, run in enumerate(runs) if (own := series_of(run.records, name, i))]
            rows += [_curve_row(runs, line, name) for line in lines]
            number += 1
            if is_constant(lines) and (len(lines[0].values) > 1 or len(runs) > 1):
                constant.append(f"{name} {text_of(lines[0].values[0])}")
            elif number <= MOST_CHARTS:
                about, label, marks = TITLES.get(name, ""), f"curve-{number}", _marks(runs)
                charts.append(chart(name, about, lines, label=label, marks=marks, most=most))
        run = ["run"] if len(runs) > 1 else []
        head = ["metric", *run, "first", "last", "smallest", "largest", "values", "not finite"]
        text = f"Always the same: {', '.join(constant)}." if constant else None
        content = (
            tag("h3", group),
            tag("div", *charts, class_="charts") if charts else None,
            tag("p", text, class_="constant") if text else None,
            details("Values as a table", table(f"{group}: values", head, rows)),
        )
        parts.append(tag("div", *content, class_="group"))
    return section("curves", "Curves", _words_of_curves(runs), *parts)


def _words_of_curves(runs: Runs) -> Markup:
    steps = ", ".join(map(str, _marks(runs)))
    resumed = f" Dashed lines are the steps at which the run resumed: {steps}." if steps else ""
    text = (
        "Point at a chart, or focus it and press the arrow keys, to read its values. With "
        f"{FEW} values or more, the strong line is a mean over a tenth of them.{resumed}"
    )
    box = tag("input", type="search", id="filter", autocomplete="off")
    words = tag("label", "Show metrics with ", box, for_="filter", hidden=True, id="filter-label")
    return tag("div", tag("p", text), words)


def _of_evaluation(runs: Runs) -> set[str]:
    """Metrics that the section of evaluations shows, and standard errors."""
    found = {
        f"{names.EVAL}{name}/{key}"
        for run in runs
        for name, of in results(run.records).items()
        for key in of
    }
    for run in runs:
        for record in run.records:
            found |= {n for n in record if n.startswith(names.EVAL) and not set_and_quantity(n)}
    return found


def _curve_row(runs: Runs, line: Series, name: str) -> list[Child]:
    values = [value for _, value in line.finite()]
    ends = [text_of(end) for end in (min(values), max(values))] if values else ["", ""]
    return [
        name,
        *([runs[line.run].name] if len(runs) > 1 else []),
        text_of(line.values[0]),
        text_of(line.values[-1]),
        *ends,
        str(len(line.values)),
        str(len(line.values) - len(values)),
    ]


def phases(runs: Runs) -> Section | None:
    """Show seconds per step and memory by phase as bars."""
    seconds = [_mean_seconds(run) for run in runs]
    tokens = [_means(run, names.TOKENS_PER_S) for run in runs]
    order = dict.fromkeys(phase for own in seconds for phase in own)
    parts: list[Markup] = []
    if order:
        largest = max(value for own in seconds for value in own.values())
        rows: list[list[Child]] = []
        for phase in order:
            row: list[Child] = [phase]
            for number, own in enumerate(seconds):
                row.append(_seconds_bar(own, phase, largest, number))
                speed = tokens[number].get(phase)
                row.append("" if speed is None else f"{speed:,.0f}")
            rows.append(row)
        head = ["phase", *(text for run in runs for text in _heads(runs, run))]
        parts.append(table("Time of a step by phase", head, rows))
    for prefix, words in ((PARTS, "parts of roles on the device"), (DEVICE, "allocated by torch")):
        if made := _memory_table(runs, prefix, words):
            parts.append(made)
    return section("phases", "Time and memory by phase", *parts) if parts else None


def _heads(runs: Runs, run: Contents) -> list[str]:
    whose = f"{run.name}: " if len(runs) > 1 else ""
    return [f"{whose}seconds per step", "tokens per second"]


def _mean_seconds(run: Contents) -> dict[str, float]:
    """Mean seconds per step of each phase, over all steps."""
    trained = [record for record in run.records if names.STEP_SECONDS in record]
    found = dict.fromkeys(phase for record in trained for phase in names.phases(record))
    own = {p: [r.get(names.SECONDS + p, 0.0) for r in trained] for p in found}
    means = {phase: fmean([*filter(is_shown, values)] or [0.0]) for phase, values in own.items()}
    return {p: v for p, v in means.items() if p != names.OTHER} | {
        p: v for p, v in means.items() if p == names.OTHER
    }


def _seconds_bar(own: dict[str, float], phase: str, largest: float, run: int) -> Markup:
    value, total = own.get(phase, 0.0), sum(own.values())
    share = 100 * value / total if total > 0 else 0
    return bar(f"{value:.2f} s, {share:.0f} %", value, largest, run)


def _means(run: Contents, prefix: str) -> dict[str, float]:
    found = _values(run, prefix)
    return {name: fmean(values) for name, values in found.items()}


def _values(run: Contents, prefix: str) -> dict[str, list[float]]:
    """Finite values of the metrics that begin with a prefix, by the rest of their names."""
    found: dict[str, list[float]] = {}
    for record in run.records:
        for name, value in record.items():
            if name.startswith(prefix) and is_shown(value):
                found.setdefault(name.removeprefix(prefix), []).append(value)
    return found


def _memory_table(runs: Runs, prefix: str, words: str) -> Markup | None:
    peaks = [{k: max(v) for k, v in _values(run, prefix).items()} for run in runs]
    order = dict.fromkeys(phase for own in peaks for phase in own)
    largest = max((value for own in peaks for value in own.values()), default=0.0)
    if largest <= 0:
        return None
    rows: list[list[Child]] = [
        [
            phase,
            *(
                bar(f"{own.get(phase, 0.0):.3g} GB", own.get(phase, 0.0), largest, number)
                for number, own in enumerate(peaks)
            ),
        ]
        for phase in order
    ]
    head = ["phase", *(run.name if len(runs) > 1 else "largest of all ranks" for run in runs)]
    return table(f"Peak memory by phase: {words}", head, rows)
