"""Where a run was saved, and where it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from spmdrl.kept import Journal

Saved = dict[str, dict[str, float]]
"""What a flow wants to find again: by owner, numbers by name, equal on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What a checkpoint holds beside roles and calls: as it was between two steps.

    Args:
        steps_done: before it.
        saved: what flows want to find again.
        metrics_lines: of metrics.jsonl that belong to the steps done.
        versions: of the policies.
        generators: the states of the global random generators of this rank.
    """

    steps_done: int = 0
    saved: Saved = field(default_factory=dict)
    metrics_lines: int = 0
    versions: Mapping[str, int] = field(default_factory=dict)
    generators: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Where a run goes on: in step `steps_done`, of which `journal` holds the calls.

    Args:
        path: of the checkpoint; None: there is none, the run begins.
    """

    path: Path | None = None
    steps_done: int = 0
    saved: Saved = field(default_factory=dict)
    metrics_lines: int = 0
    journal: Journal = field(default_factory=Journal)
