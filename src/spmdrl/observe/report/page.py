"""The page: one file of HTML with its style, script and pictures inside, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from spmdrl.observe.report import measures, sections
from spmdrl.observe.report.charts import legend
from spmdrl.observe.report.contents import Contents
from spmdrl.observe.report.markup import Markup, raw, tag

SECTIONS = (
    sections.overview,
    sections.findings,
    measures.evaluation,
    measures.curves,
    measures.phases,
    sections.samples,
    sections.configuration,
    sections.starts,
    sections.versions,
)
"""Sections of a page in their order; each makes nothing where no run recorded anything for it."""


def page(runs: Sequence[Contents], written: str) -> str:
    """Make the page of one run, or of several side by side.

    Args:
        written: date and time that the page states.
    """
    made = [content for make in SECTIONS if (content := make(runs)) is not None]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    links = [tag("li", tag("a", own.title, href=f"#{own.label}")) for own in made]
    nav = tag("nav", tag("ul", *links), aria_label="Sections")
    lines = legend([run.name for run in runs]) if len(runs) > 1 else None
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("h1", title),
            tag("p", f"Written by spmdrl at {written}"),
        ),
        tag("div", nav, lines, class_="top"),
        tag("main", *(own.content for own in made), id="content", tabindex="-1"),
        raw("script", _own("page.js")),
    )
    return f"<!DOCTYPE html>\n{tag('html', _head(title), body, lang='en').text}\n"


def _head(title: str) -> Markup:
    # no other script than this one runs, and nothing is loaded, whatever a text on the page holds
    digest = base64.b64encode(hashlib.sha256(_own("page.js").encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} - spmdrl"),
        tag("link", rel="icon", href="data:,"),  # browsers ask for one otherwise
        raw("style", _own("page.css")),
    )


def _own(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
