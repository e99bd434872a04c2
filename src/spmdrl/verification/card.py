"""A verification card: one Markdown table with a row per variant and a column per line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spmdrl.verification.lines import Line, show

ABSENT = "absent"
_LONGEST = 60


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A model and what was found about it.

    Args:
        source: its config.json.
        lines: none if it was refused.
        refused: why it was refused.
    """

    name: str
    source: Mapping[str, Any]
    lines: tuple[Line, ...] = ()
    refused: str = ""


def card(title: str, models: Sequence[Verified]) -> str:
    """Write the card of some variants of a model."""
    columns = list(dict.fromkeys(line.name for model in models for line in model.lines))
    limits = {line.name: line.limit for model in models for line in model.lines}
    first = models[0].source
    rows = []
    for model in models:
        special = (
            f"{model.name}: {_special(model.source, first)}" if len(models) > 1 else model.name
        )
        by_name = {line.name: line for line in model.lines}
        cells = [_cell(by_name.get(name)) for name in columns]
        if model.refused:
            cells[:1] = [f"refused: {model.refused.replace('|', '/')}"]
        rows.append([special, *cells])
    worst = [
        _worst([m for model in models for m in model.lines if m.name == name]) for name in columns
    ]
    lines = [
        f"# {title}",
        "",
        f"Written by `spmdrl verify-model` on {date.today().isoformat()}: spmdrl "
        f"{version('spmdrl')}, transformers {version('transformers')}, torch {version('torch')}. "
        "[What the columns mean](README.md).",
        "",
        _row(["variant", *columns]),
        _row(["---"] * (1 + len(columns))),
        *[_row(row) for row in rows],
        _row(["**worst**", *worst]),
        _row(["limit", *[show(limits[name]) for name in columns]]),
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    if line.figure is None:
        return "not offered"
    return show(line.figure) if line.holds else f"**{show(line.figure)}**"


def _worst(lines: Sequence[Line]) -> str:
    figures = [line.figure for line in lines if line.figure is not None]
    return show(max(figures)) if figures else "not offered"


def _special(source: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Write the keys whose values differ from the first variant's."""
    if source == first:
        return f"`{source.get('model_type', '')}`"
    keys = [k for k in sorted({*source, *first}) if source.get(k, ABSENT) != first.get(k, ABSENT)]
    return ", ".join(f"`{key}`={_short(source.get(key, ABSENT))}" for key in keys)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def write_card(file: Path, models: Sequence[Verified]) -> None:
    """Write a card named after its file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(card(file.stem, models), encoding="utf-8")
