"""Pages of reports: whole HTML that screen readers can follow, that loads nothing and runs nothing
of what a run wrote, however odd its metrics and texts are.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import make_run, record, write_rollouts

from spmdrl.observe.report.charts import value_axis
from spmdrl.observe.report.contents import Contents, read_run
from spmdrl.observe.report.page import page

VOID = {"meta", "link", "br", "input", "img"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\x00\u202e\ud800"
NAN, INF = float("nan"), float("inf")


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    parent: Element | None
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def inside(self, name: str) -> list[Element]:
        own = [self] if self.name == name else []
        return own + [found for child in self.children for found in child.inside(name)]


class Reader(HTMLParser):
    """Reads a page as a tree; refuses ends that do not fit the open elements."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.open = Element("", {}, None)
        self.all: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        made = Element(tag, dict(attrs), self.open)
        self.open.children.append(made)
        self.all.append(made)
        if tag not in VOID:
            self.open = made

    def handle_endtag(self, tag: str) -> None:
        assert self.open.name == tag, f"</{tag}> where <{self.open.name}> is open"
        assert self.open.parent is not None
        self.open = self.open.parent

    def handle_data(self, data: str) -> None:
        element: Element | None = self.open
        while element is not None:
            element.text += data
            element = element.parent


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open is reader.root, f"<{reader.open.name}> is never closed"
    return reader


def check(text: str) -> Reader:
    """Read a page, and check what holds for all."""
    assert text.startswith("<!DOCTYPE html>\n") and text.endswith("\n")
    reader = read(text)
    ids = [e.attributes["id"] for e in reader.all if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in reader.all:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.name, name)
            if name in ("aria-labelledby", "aria-describedby", "for"):
                assert set((value or "").split()) <= set(ids), value
            if name in ("src", "href", "action", "data", "srcset"):
                assert value == "data:," or (value or "").removeprefix("#") in ids, value
    assert [e.attributes["lang"] for e in reader.root.inside("html")] == ["en"]
    for name in ("h1", "main", "nav", "header", "title"):
        found = [e for e in reader.root.inside(name) if not (e.parent and e.parent.name == "svg")]
        assert len(found) == 1, name
    levels = [int(e.name[1]) for e in reader.all if re.fullmatch("h[1-6]", e.name)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))
    for table in reader.root.inside("table"):
        assert table.children[0].name == "caption" and table.children[0].text
        heads = table.inside("th")
        assert heads and all(th.attributes["scope"] in ("row", "col") for th in heads)
        assert len({len(tr.children) for tr in table.inside("tr")}) == 1
    for svg in reader.root.inside("svg"):
        if svg.attributes.get("aria-hidden") != "true":
            assert svg.attributes["role"] == "img"
            assert [e.name for e in svg.children[:2]] == ["title", "desc"] and svg.children[1].text
    for path in reader.root.inside("path"):
        assert re.fullmatch(r"[-MLh0-9. e]*", path.attributes["d"] or ""), path.attributes["d"]
    return reader


def page_of(*directories: Path) -> str:
    return page([read_run(directory) for directory in directories], "now")


def words(reader: Reader, name: str, label: str) -> str:
    return next(e.text for e in reader.root.inside(name) if e.attributes.get("id") == label)


def test_a_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    entry = {
        "started": "2026-01-01T00:00:00+0000",
        "command": "spmdrl train x",
        "commit": "abc+",
        "ranks": 2,
        "device": "cpu (2 cores)",
        "versions": {"torch": "2.13.0"},
        "config": {"model": {"path": "models/tiny"}, "rewards": [{"function": "number"}]},
    }
    evaluated = {0: {"sums": 0.1}, 40: {"sums": 0.9}}
    run = make_run(tmp_path / "my run", 40, evaluated=evaluated, starts=[entry])
    row = {"prompt_id": 0, "sample": 0, "reward": 1.0, "prompt": "1+1?", "response": "two"}
    write_rollouts(run, 40, [row])
    text = page_of(run)
    reader = check(text)
    assert not re.search(r"https?:|//\w|@import|url\(|fetch\(|XMLHttp", text)
    sections = [e.attributes["id"] for e in reader.root.inside("section")]
    assert sections == [
        *("overview", "findings", "evaluation", "curves", "phases", "samples"),
        *("configuration", "starts", "versions"),
    ]
    links = [e.attributes["href"] for e in reader.root.inside("nav")[0].inside("a")]
    assert links == [f"#{label}" for label in sections]
    for part in ("abc+", "models/tiny", "cpu (2 cores)", "0.075 → 0.95"):
        assert part in words(reader, "section", "overview")
    assert "0.9 ± 0.02 (step 40)" in words(reader, "section", "evaluation")
    assert "None saw anything in 40 steps" in words(reader, "section", "findings")
    assert "2.00 s, 56 %" in words(reader, "section", "phases")
    assert "groups 8" in words(reader, "section", "curves"), "what is constant has no chart"
    assert "two" in words(reader, "section", "samples")
    assert '[{"function": "number"}]' in words(reader, "section", "configuration")


def test_only_the_page_s_own_script_may_run(tmp_path: Path) -> None:
    reader = check(page_of(make_run(tmp_path, 3)))
    [script] = reader.root.inside("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    metas = [e.attributes for e in reader.root.inside("meta")]
    [policy] = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy and "script-src 'unsafe" not in policy


def test_what_a_run_wrote_is_text(tmp_path: Path) -> None:
    name = "<b>&'\"run"
    config = {"model": {"path": EVIL}, EVIL: EVIL}
    entry = {"config": config, "command": EVIL, "versions": {EVIL: EVIL}, "commit": EVIL}
    run = make_run(
        tmp_path / name,
        30,
        starts=[entry, {**entry, "config": {}}],
        evaluated={0: {EVIL.replace("/", ""): 0.1}, 30: {EVIL.replace("/", ""): 0.2}},
        changed={step: {EVIL: float(step)} for step in range(1, 31)},
    )
    row = {"prompt_id": 0, "sample": 0, "reward": 1.0, "finish": EVIL, "answer": EVIL}
    write_rollouts(run, 1, [{**row, "prompt": EVIL, "response": EVIL, f"reward/{EVIL}": 1}])
    (run / "attempt_0000").mkdir()
    (run / "attempt_0000" / "outcome").write_text("crashed")
    (run / "attempt_0000" / "failed").write_text("<script>alert(3)</script>")
    reader = check(page_of(run, make_run(tmp_path / "other", 3)))
    assert len(reader.root.inside("script")) == 1 and not reader.root.inside("img")
    assert not reader.root.inside("b")
    shown = EVIL.replace("\x00", "\u2400")
    responses = [e for e in reader.root.inside("pre") if e.attributes["aria-label"] == "response"]
    assert [e.text for e in responses] == [shown]
    assert name in words(reader, "section", "overview")
    assert "crashed: <script>alert(3)</script>" in words(reader, "section", "overview")


@pytest.mark.parametrize(
    "values",
    [
        [NAN] * 5,
        [1.0, NAN, INF, -INF, 2.0],
        [0.0] * 5,
        [1e308, -1e308, 1e308, 0.0, 1.0],
        [1e-300, 1e90, 1.0, 1.0, 1.0],
        [5e-324, 1.0, 5e-324, 1.0, 0.0],
        [-3.0, -2.0, -2.5, -2.75, -2.9],
        [NAN, NAN, 4.0, NAN, NAN],
        [1.0, 1.0 + 1e-15, 1.0, 1.0, 1.0],
        [NAN if n % 7 == 0 else math.sin(n) for n in range(500)],
    ],
    ids=lambda values: f"{len(values)} from {values[0]}",
)
def test_no_value_breaks_a_page(tmp_path: Path, values: list[float]) -> None:
    changed = {
        step: {"mine": value, "eval/a/accuracy": value, "eval/a/standard_error": value}
        | {"reward": value, "seconds/step": value, "seconds/rollout": value, "ref_kl": value}
        | {"memory/peak_gb": value, "memory/parts_gb/rollout": value}
        for step, value in enumerate(values, start=1)
    }
    text = page_of(make_run(tmp_path, len(values), changed=changed))
    check(text)
    # a picture's places are numbers within it
    for place in re.findall(r' (?:x|y|cx|cy|x1|x2|y1|y2)="([^"]*)"', text):
        assert -10 <= float(place) <= 330


def test_an_error_bar_that_ends_near_zero_leaves_the_axis_linear() -> None:
    values, bars = [0.04, 0.13, 0.94], [0.0001, 0.0799, 0.09, 0.17, 0.92, 0.96]
    axis = value_axis(values, bars)
    assert not axis.logarithmic and axis.low == 0 and axis.high > 0.96
    wide = value_axis([*values, 1e-6], [*bars, 1.0])
    assert wide.logarithmic and (wide.low, wide.high) == (1e-6, 1.0)


def test_missing_and_repeated_steps_are_drawn_once(tmp_path: Path) -> None:
    """A run killed after step 9 resumes at step 5; steps 6 and 7 were not recorded."""
    run = make_run(tmp_path, 9)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = [line.replace('"reward": ', '"reward": 7') for line in lines[4:5] + lines[7:]]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], *again, '{"step": 10, "rew']))
    contents = read_run(run)
    assert [r["step"] for r in contents.records] == [1, 2, 3, 4, 5, 8, 9]
    reader = check(page([contents], "now"))
    [chart] = [e for e in reader.root.inside("figure") if e.attributes["data-name"] == "reward"]
    assert len(chart.inside("circle")) == 7


def test_a_resume_is_marked(tmp_path: Path) -> None:
    starts = [{"started": f"2026-01-01T0{hour}:00:00+0000", "config": {}} for hour in (0, 1)]
    run = make_run(tmp_path, 8, starts=starts, seconds_per_step=900.0)
    reader = check(page_of(run))
    charts = [e for e in reader.root.inside("svg") if e.attributes.get("role") == "img"]
    marks = [e for e in reader.root.inside("line") if e.attributes.get("class") == "resumed"]
    assert len(marks) == len(charts) > 3
    assert "resumed: 4." in words(reader, "section", "curves")


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    """One without a step, without a configuration, and without evaluations among them."""
    entry = {"config": {"train": {"lr": 0.1}}, "versions": {"torch": "1"}}
    full = make_run(tmp_path / "full", 5, evaluated={5: {"a": 0.5}}, starts=[entry])
    bare = make_run(tmp_path / "bare", 25)
    none = make_run(tmp_path / "none", 0, starts=[{**entry, "config": {"train": {"lr": 0.2}}}])
    reader = check(page_of(full, bare, none))
    heads = [th.text for th in reader.root.inside("table")[0].inside("th")][:4]
    assert heads == ["", "full", "bare", "none"]
    assert "train.lr0.1default0.2" in words(reader, "section", "configuration")
    [chart] = [e for e in reader.root.inside("figure") if e.attributes["data-name"] == "reward"]
    drawn = [e.attributes.get("class") for e in chart.inside("g")]
    assert drawn == ["axes", "run0", "run1"]
    legend = [e for e in reader.root.inside("ul") if e.attributes.get("class") == "legend"]
    assert [li.text for li in legend[0].inside("li")] == ["1. full", "2. bare", "3. none"]
    assert "none: metrics: no step has been recorded yet" in words(reader, "section", "overview")


def test_findings_have_their_steps(tmp_path: Path) -> None:
    flat = {step: {"reward_std": 0.0 if step in (2, 3, 4, 5, 9) else 0.3} for step in range(1, 10)}
    reader = check(page_of(make_run(tmp_path, 9, changed=flat)))
    found = words(reader, "section", "findings")
    assert "flat reward4 to 5every reward of the last 3 steps" in found


def long(num_steps: int, num_metrics: int, path: Path) -> Contents:
    contents = read_run(make_run(path, 3))
    names = [f"layer_{n}/share_of_tokens" for n in range(num_metrics)]
    records = [
        {"step": float(step), **record(step, num_steps)}
        | {name: math.sin(step * n) for n, name in enumerate(names)}
        for step in range(1, num_steps + 1)
    ]
    return replace(contents, records=records)


@pytest.mark.parametrize(("num_steps", "num_metrics"), [(1000, 60), (100, 800)])
def test_a_page_is_small_however_much_was_recorded(
    tmp_path: Path, num_steps: int, num_metrics: int
) -> None:
    one = long(num_steps, num_metrics, tmp_path)
    text = page([one], "now")
    assert len(text.encode()) < 3e6
    if num_metrics < 100:
        check(text)
        both = page([one, replace(one, name="other")], "now")
        assert len(both.encode()) < 3e6
