"""`Line`: one thing that a verification claims, with the figure that was found and its limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

CLOSE = 1e-4
"""Most relative difference between two ways to compute the same in float32."""

SAME = 1e-6
"""Most relative difference between the same computations on the same weights."""

MARGIN = 1e-4
"""Lead of a token's score, in nats, that rounding may turn over."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One claim about a model.

    Args:
        name: short name, a column of the card.
        figure: what was found: a relative difference, or a number of samples that differ; None: it
            is not offered.
        limit: most that the figure may be.
        note: what was compared, or why it is not offered.
    """

    name: str
    figure: float | None
    limit: float
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.figure is None or self.figure <= self.limit

    @property
    def text(self) -> str:
        if self.figure is None:
            return f"{self.name:<24} not offered: {self.note}"
        verdict = "holds" if self.holds else "DOES NOT HOLD"
        found = f"{show(self.figure)} <= {show(self.limit)}"
        return f"{self.name:<24} {found:<22} {verdict}{f' ({self.note})' * bool(self.note)}"


def show(figure: float) -> str:
    """Write a difference with two digits, a count as it is."""
    return f"{figure:.0f}" if figure == 0 or figure >= 1 else f"{figure:.1e}"


def peak(values: Tensor) -> float:
    """Return the largest magnitude; 0 of no values, infinity if one is not finite."""
    if not values.numel():
        return 0.0
    largest = float(values.abs().max())
    return largest if math.isfinite(largest) else math.inf


def difference(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """Return the largest difference relative to the largest magnitude of `wanted`.

    Args:
        least: magnitude that counts where `wanted` has a smaller one.
    """
    if found.shape != wanted.shape:
        return math.inf
    gap = peak(found.double() - wanted.double())
    scale = max(peak(wanted), least)
    return gap / scale if scale else gap


FLOOR = 1e-3
"""Share of the largest gradient of all tensors below which a tensor's own is rounding: that of a
bias of keys, say, is 0 but for it."""


def worst_gradient(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """Compare gradients by name; return the worst relative difference and its tensor.

    Tensors that only one has must have no gradient: parts of a model that text does not use, what
    transformers keeps as a buffer.
    """
    floor = FLOOR * max((peak(values) for values in wanted.values()), default=0.0)
    worst, name = 0.0, ""
    for each in sorted({*found, *wanted}):
        if each not in wanted or each not in found:
            only = found[each] if each in found else wanted[each]
            gap = math.inf if only.any() else 0.0
        else:
            gap = difference(found[each], wanted[each], floor)
        if gap > worst:
            worst, name = gap, each
    return worst, name
