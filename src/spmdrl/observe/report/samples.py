"""The best and the worst samples of a run: of its last logged rollouts, else of an evaluation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmdrl.observe.rollout_log import given_name, logged_steps, read_rollouts

MOST_LETTERS = 3000
"""Letters of a text that a page shows."""

MOST_TURNS = 12
"""Texts of a sample's turns that a page shows."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Args:
    facts: reward, advantage, tokens and the like, as texts by name.
    texts: prompt, response or turns, and answer, by name, cut to `MOST_LETTERS`.
    command: words of the command that shows all of it; None: there is none.
    """

    facts: Mapping[str, str]
    texts: Sequence[tuple[str, str]]
    command: str | None


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Args:
    origin: what the samples are of.
    count: number of samples that these were chosen from.
    best, worst: at most one sample of a prompt in each.
    """

    origin: str
    count: int
    best: Sequence[Sample]
    worst: Sequence[Sample]


def read_samples(run_dir: Path, count: int) -> Samples | None:
    """Choose the `count` samples with the highest and with the lowest rewards; None: there are
    none. Files that are not whole, as a killed run leaves them, count as not written.
    """
    for step in reversed(logged_steps(run_dir)[-2:]):
        try:
            rows = read_rollouts(run_dir, step)
            shows = f"spmdrl show {run_dir} --step {step} --sample"
            commands = [f"{shows} {number}" for number in range(len(rows))]
            return _chosen(rows, commands, f"step {step}", count)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    for step, name, file in _evaluations(run_dir):
        try:
            # not splitlines: texts may hold other characters that end lines, such as U+2028
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            rows = [json.loads(line) for line in lines]
            origin = f"the held-out set {name} after {step} steps"
            return _chosen(rows, [None] * len(rows), origin, count)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _evaluations(run_dir: Path) -> list[tuple[int, str, Path]]:
    """Files of the last evaluation: step, set and path; the set `held_out` first."""
    found = []
    for file in (run_dir / "evaluation").glob("*.jsonl"):
        match = re.fullmatch(r"(.+)_(\d{8})", file.stem)
        if match:
            found.append((int(match[2]), match[1], file))
    last = max((step for step, _, _ in found), default=0)
    own = [item for item in found if item[0] == last]
    return sorted(own, key=lambda item: (item[1] != "held_out", item[1]))


def _chosen(
    rows: Sequence[Mapping[str, Any]], commands: Sequence[str | None], origin: str, count: int
) -> Samples | None:
    order = sorted(range(len(rows)), key=lambda i: _reward(rows[i]), reverse=True)
    best = _one_of_a_prompt(rows, order, count)
    worst = _one_of_a_prompt(rows, [i for i in reversed(order) if i not in best], count)
    if not rows:
        return None
    made = {i: _sample(rows[i], commands[i]) for i in (*best, *worst)}
    return Samples(
        origin=origin,
        count=len(rows),
        best=[made[i] for i in best],
        worst=[made[i] for i in worst],
    )


def _reward(row: Mapping[str, Any]) -> float:
    reward = row["reward"]
    return float(reward) if reward is not None and not math.isnan(reward) else -math.inf


def _one_of_a_prompt(
    rows: Sequence[Mapping[str, Any]], order: Sequence[int], count: int
) -> list[int]:
    found: dict[Any, int] = {}
    for i in order:
        if len(found) == count:
            break
        found.setdefault(rows[i]["prompt_id"], i)
    return list(found.values())


def _sample(row: Mapping[str, Any], command: str | None) -> Sample:
    facts = {"reward": _number(row["reward"])}
    parts = {n: v for n, v in row.items() if n.startswith("reward/")}
    if len(parts) > 1:
        facts |= {name: _number(value) for name, value in parts.items()}
    if row.get("advantage") is not None:
        facts["advantage"] = _number(row["advantage"])
    facts["tokens"] = str(row.get("response_tokens", row.get("tokens", "not recorded")))
    facts["finish"] = str(row.get("finish", "not recorded"))
    texts = [("prompt", row.get("prompt")), *_said(row), ("answer", row.get("answer"))]
    return Sample(
        facts=facts,
        texts=[(name, _cut(str(text))) for name, text in texts if text is not None],
        command=command,
    )


def _said(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The response, or the turns with what the model read after each."""
    if not row.get("turns"):
        return [("response", row.get("response"))]
    found = []
    for number, turn in enumerate(row["turns"], start=1):
        found.append((f"turn {number}, reward {_number(turn['reward'])}", turn["text"]))
        if turn["given"]:
            found.append((given_name(row["turns"], number), turn["given"]))
    more = len(found) - MOST_TURNS
    return found[:MOST_TURNS] + [("left out", f"{more} more texts")] * (more > 0)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "no number"


def _cut(text: str) -> str:
    more = len(text) - MOST_LETTERS
    return text if more <= 0 else f"{text[:MOST_LETTERS]} [{more} more letters]"
