"""Points at which a run is saved and from which it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

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
