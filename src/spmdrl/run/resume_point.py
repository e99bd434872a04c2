"""Points at which a run is saved and from which it resumes, and the messages of a resumed run: what
has changed, and how exactly it resumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from spmdrl.config.key_table import WILDCARDS, key_fields
from spmdrl.config.migrate import migrated
from spmdrl.config.sections import Config
from spmdrl.config.user_objects import source_digest
from spmdrl.roles.kept import Journal

Saved = dict[str, dict[str, float]]
"""Numbers that a flow needs again after a resume: owner -> name -> number, equal on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """State between two steps that a checkpoint holds in addition to roles and calls.

    Args:
        steps_done: number of steps done before it.
        saved: numbers that the flow needs again.
        metrics_lines: number of lines of metrics.jsonl that belong to the steps done.
        versions: policy -> its weight version.
        generators: the states of this rank's global random generators.
    """

    steps_done: int = 0
    saved: Saved = field(default_factory=dict)
    metrics_lines: int = 0
    versions: Mapping[str, int] = field(default_factory=dict)
    generators: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Point from which a run resumes: in step `steps_done`, whose calls `journal` holds.

    Args:
        path: the checkpoint's directory, or None for a fresh run.
    """

    path: Path | None = None
    steps_done: int = 0
    saved: Saved = field(default_factory=dict)
    metrics_lines: int = 0
    journal: Journal = field(default_factory=Journal)


_NO_MATTER = ("run_dir", "steps", "timeout_s", "limits", "log", "checkpoint", "evaluation", "fold")
"""Sections and keys whose changes need no warning."""


def changed_keys(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Keys that decide results and differ from a checkpoint's configuration, one text for each.

    Args:
        saved: that configuration; keys may have the names that they had when it was saved. One
            that did not exist then had its default's effect.
    """
    before, now = _flat(migrated(saved)), _flat(config.model_dump(mode="json"))
    defaults = _defaults()
    for key in now.keys() - before.keys():
        before[key] = defaults.get(_wild(key))
    return [
        f"{key} was {before[key]!r} and is {now.get(key)!r}"
        for key in sorted(before)
        if before[key] != now.get(key) and key.split(".")[0] not in _NO_MATTER
    ]


def _defaults() -> dict[str, Any]:
    """Key of `known_keys` -> its default, as JSON has it."""
    found = {key: field.get_default(call_default_factory=True) for key, field in key_fields()}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


def _wild(key: str) -> str:
    """Return the key of `known_keys` that a configuration's key is one of."""
    section, *rest = key.split(".")
    return ".".join([section, WILDCARDS[section], *rest[1:]]) if section in WILDCARDS else key


def describe_journal(journal: Journal, *, is_same: bool) -> str:
    """Describe how exactly a run resumes within its step; "" if it begins a new one."""
    texts = []
    num_done = sum(kept.record is not None for kept in journal.calls)
    if num_done:
        texts.append(f"{num_done} calls return what they gave, where they are asked the same")
    for part in (kept.part for kept in journal.calls if kept.part is not None):
        if part.values is not None:
            texts.append(f"an update resumes after {part.values['minibatches']} minibatches")
        if part.rows is not None and part.state and is_same:
            texts.append("generation resumes bit for bit")
        elif part.rows is not None:
            texts.append(
                "generation keeps what it had drawn; the tails are equal in distribution, not in "
                "bits"
            )
    return "; ".join(dict.fromkeys(texts))


def describe_roles(config: Config) -> dict[str, str]:
    """Describe each role, without its ranks and without what a checkpoint restores."""
    found = {}
    for name, section in config.roles.items():
        kind = config.role_kind(name)
        parts: list[object] = [kind]
        if not config.is_trained(name) and kind != "rollout":
            parts += [str(config.model_path(name).resolve()), section.head]
            if section.adapter is not None:
                parts.append(section.adapter.model_dump(mode="json"))
        elif section.adapter is not None:  # its scale is no tensor that a checkpoint restores
            parts.append(section.adapter.model_dump(mode="json", include={"alpha", "rslora"}))
        if ":" in kind:
            parts += [source_digest(kind), sorted(section.options.items())]
        found[name] = repr(parts)
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= inner or {prefix + key: value}
    return found
