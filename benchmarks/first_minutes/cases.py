"""`Case`: one measurement of a stage, and what it is given and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from first_minutes.cards import Ceilings


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The input of every stage.

    Args:
        small: tiny shapes.
        ceilings: the machine's, measured or published; values may be None.
        device: the GPU.
    """

    small: bool
    ceilings: Ceilings
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a case. Names carry their units; predictions that cannot be computed are None.

    Args:
        predicted: values by name, of those in `measured`.
        facts: what else a reader wants to know, such as a lower bound.
        skipped: reason why nothing was measured.
    """

    measured: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float | None] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    run: Callable[[], Outcome]
