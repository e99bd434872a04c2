"""Predicted against published step times; none of them was used to choose a rate or a share."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import pytest
from published import Published, rows, vime_8b

PAGE = Path(__file__).parents[3] / "docs" / "plan-truth.md"
QUICK = ("llama-3.1-8b", "llama-2-7b", "llama-2-13b")
"""Models whose rows are planned in about a second each."""


def ratio(row: Published) -> float:
    found = row.predict()
    return found.seconds / row.measured(found)


def median_factor(ratios: list[float]) -> float:
    """The median of how far predictions are off, as a factor in either direction."""
    return math.exp(statistics.median(abs(math.log(own)) for own in ratios))


def on_page() -> dict[str, tuple[float, float]]:
    """Name -> published and predicted seconds in the page's table."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| ([^|]+) \| [^|]+ \| ([\d,]+) \| ([\d,]+) \| [\d.]+ \|", line):
            name, published, predicted = match.groups()
            found[name] = (
                float(published.replace(",", "")),
                float(predicted.replace(",", "")),
            )
    return found


def check_page(row: Published) -> float:
    """Compare a row with the page's and return predicted / published."""
    found = row.predict()
    measured = row.measured(found)
    published, predicted = on_page()[row.name]
    assert published == pytest.approx(measured, abs=1)
    assert predicted == pytest.approx(found.seconds, rel=0.05), f"{PAGE}: {row.name}"
    return found.seconds / measured


def test_quick_rows_are_within_the_factor_of_one_and_a_half() -> None:
    chosen = [row for row in rows() if row.model in QUICK]
    assert len(chosen) == 5
    assert median_factor([check_page(row) for row in chosen]) < 1.5


@pytest.mark.full
def test_the_median_of_all_rows_is_within_the_factor_of_one_and_a_half() -> None:
    assert {row.name for row in rows()} == set(on_page())
    assert median_factor([check_page(row) for row in rows()]) < 1.5


def test_the_page_has_the_predicted_rollout() -> None:
    row = vime_8b()
    found = row.predict().phase_seconds["rollout"]
    shown = re.search(
        r"RL-Kernel#377 \| rollout \| 82-130 \| (\d+) s", PAGE.read_text(encoding="utf-8")
    )
    assert shown is not None
    assert float(shown[1]) == pytest.approx(found, rel=0.05)
