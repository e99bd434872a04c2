"""Sections of a report on one run, or on several side by side: facts, findings, samples, starts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from spmdrl.observe import names
from spmdrl.observe.detectors import Episode
from spmdrl.observe.report.contents import Contents
from spmdrl.observe.report.curves import series_of, text_of
from spmdrl.observe.report.markup import Markup, tag
from spmdrl.observe.report.samples import Sample
from spmdrl.observe.report.starts import FIELDS, HARDWARE, differences
from spmdrl.observe.report.tables import Section, details, section, table

Runs = Sequence[Contents]

NOT_RECORDED = "not recorded"


def overview(runs: Runs) -> Section:
    """Tell the facts of each run, and what is missing."""
    facts = [facts_of(run) for run in runs]
    keys = dict.fromkeys(key for own in facts for key in own)
    rows = [[key, *(own.get(key, NOT_RECORDED) for own in facts)] for key in keys]
    head = ["", *(run.name for run in runs)]
    items = [
        tag("li", f"{run.name}: {text}" if len(runs) > 1 else text)
        for run in runs
        for text in run.missing
    ]
    missing = tag("div", tag("p", "Not recorded:"), tag("ul", *items), class_="missing")
    return section(
        "overview",
        "Overview",
        table("What ran, and what became of it", head, rows, caption_hidden=True),
        missing if items else None,
    )


def facts_of(run: Contents) -> dict[str, str]:
    """Facts of a run by name; those that it did not record are left out."""
    state = run.state
    wanted = "" if state.steps is None else f" of {state.steps}"
    told = NOT_RECORDED if state.state == "empty" else state.state
    facts = {"directory": str(run.directory), "state": told}
    if state.detail:
        facts["state"] += f": {state.detail}"
    if run.model:
        facts["model"] = run.model
    if flow := run.config.get("flow"):
        facts["flow"] = flow
    trained = [r for r in run.records if names.STEP_SECONDS in r]
    if run.records:
        facts["steps"] = f"{int(run.records[-1]['step'])}{wanted}"
    if trained:
        seconds = sum(r[names.STEP_SECONDS] for r in trained)
        facts["time"] = f"{duration(seconds)} ({seconds / len(trained):.1f} s per step)"
    if values := _finite(run, names.REWARD):
        ends = max(1, min(5, len(values) // 4))
        first, last = fmean(values[:ends]), fmean(values[-ends:])
        facts["reward"] = f"{text_of(first)} → {text_of(last)}"
    if values := _finite(run, names.PEAK_MEMORY):
        facts["peak memory"] = f"{text_of(max(values))} GB per rank"
    if run.starts:
        began = run.starts[0].began
        facts["first start"] = NOT_RECORDED if began is None else date(began)
        facts["starts"] = str(len(run.starts))
        latest = run.starts[-1].told
        facts |= {key: latest[key] for key in ("commit", "ranks", "device") if key in latest}
    return facts


def _finite(run: Contents, name: str) -> list[float]:
    series = series_of(run.records, name)
    return [] if series is None else [value for _, value in series.finite()]


def duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds."""
    whole = round(seconds) if seconds < 1e9 else 0  # also false for NaN
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{text_of(seconds)} s"


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def findings(runs: Runs) -> Section:
    """Tell what the detectors saw, step by step."""
    rows = []
    for run in runs:
        found: dict[str, list[Episode]] = {}
        for episode in run.episodes:
            found.setdefault(episode.finding.name, []).append(episode)
        for name, episodes in found.items():
            first = [run.name] if len(runs) > 1 else []
            cells = [name.replace("_", " "), _steps_text(episodes), episodes[0].finding.text]
            rows.append([*first, *cells])
    text = "Detectors look at the metrics of every step for what is known to go wrong."
    if not rows:
        steps = sum(names.STEP_SECONDS in record for run in runs for record in run.records)
        none = tag("p", f"{text} None saw anything in {steps} steps.")
        return section("findings", "Findings", none)
    head = [*(["run"] if len(runs) > 1 else []), "detector", "steps", "seen first, and what to try"]
    return section("findings", "Findings", tag("p", text), table("Findings", head, rows))


def _steps_text(episodes: Sequence[Episode]) -> str:
    texts = [str(e.first) if e.first == e.last else f"{e.first} to {e.last}" for e in episodes]
    more = len(texts) - 4
    return ", ".join(texts[:4]) + (f" and {more} times more" if more > 0 else "")


def samples(runs: Runs) -> Section | None:
    """Show the samples with the highest and with the lowest rewards."""
    parts: list[Markup] = []
    for run in runs:
        if run.samples is None:
            continue
        whose = f"{run.name}: " if len(runs) > 1 else ""
        for kind, chosen in (("highest", run.samples.best), ("lowest", run.samples.worst)):
            if not chosen:
                continue
            title = f"{whose}{kind} rewards of {run.samples.count} samples of {run.samples.origin}"
            shown = [_sample(sample, number) for number, sample in enumerate(chosen, start=1)]
            parts += [tag("h3", title[0].upper() + title[1:]), tag("div", *shown, class_="samples")]
    return section("samples", "Samples", *parts) if parts else None


def _sample(sample: Sample, number: int) -> Markup:
    facts = ", ".join(f"{name} {value}" for name, value in sample.facts.items())
    texts = []
    for name, text in sample.texts:
        texts += [
            tag("h5", name),
            tag("pre", text, dir="auto", tabindex="0", role="group", aria_label=name),
        ]
    command = tag("p", "All of it: ", tag("code", sample.command)) if sample.command else None
    return tag("article", tag("h4", f"{number}. {facts}"), *texts, command)


def configuration(runs: Runs) -> Section | None:
    """Tell the given configuration, and between several runs what differs."""
    if not any(run.config for run in runs):
        return None
    parts: list[Markup] = []
    if len(runs) > 1:
        head = ["key", *(run.name for run in runs)]
        rows = _different([run.config for run in runs])
        same = tag("p", "The given configurations are the same.")
        parts.append(table("Keys that differ", head, rows) if rows else same)
    for run in runs:
        whose = f" of {run.name}" if len(runs) > 1 else ""
        given = [[key, value] for key, value in run.config.items()]
        shown = table(f"Given configuration{whose}", ["key", "value"], given, caption_hidden=True)
        if given:
            parts.append(details(f"All keys that were given{whose}: {len(given)}", shown))
    return section("configuration", "Configuration", *parts)


def _different(configs: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Rows of the keys that differ."""
    found = differences(configs)
    return [
        [key, *("default" if value is None else value for value in values)]
        for key, values in found.items()
    ]


def starts(runs: Runs) -> Section | None:
    """Tell of every start: command, commit, hardware, and what changed since the one before."""
    parts: list[Markup] = []
    for run in runs:
        whose = f" of {run.name}" if len(runs) > 1 else ""
        head = ["", *(f"start {number + 1}" for number in range(len(run.starts)))]
        told = [start.told for start in run.starts]
        rows = [["began", *(date(s.began) if s.began else NOT_RECORDED for s in run.starts)]]
        for key in (*FIELDS, *HARDWARE):
            if any(key in own for own in told):
                rows.append([key.replace("_", " "), *(own.get(key, NOT_RECORDED) for own in told)])
        if run.starts:
            parts.append(table(f"Starts{whose}", head, rows))
        changed = differences([start.config for start in run.starts]).items()
        if changed:
            rows = [
                [key, *("default" if v is None else v for v in values)] for key, values in changed
            ]
            parts.append(
                table(f"Keys that changed between starts{whose}", ["key", *head[1:]], rows)
            )
    return section("starts", "Starts", *parts) if parts else None


def versions(runs: Runs) -> Section | None:
    """Tell the versions of packages in each run's last start."""
    found = [run.starts[-1].versions if run.starts else {} for run in runs]
    packages = dict.fromkeys(name for own in found for name in own)
    if not packages:
        return None
    head = ["package", *(run.name for run in runs)]
    absent = ["not installed" if own else NOT_RECORDED for own in found]
    rows = [
        [name, *(own.get(name, none) for own, none in zip(found, absent, strict=True))]
        for name in packages
    ]
    content = table("Versions of packages", head, rows, caption_hidden=True)
    return section("versions", "Versions", content)
