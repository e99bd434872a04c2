"""Sweeps of which the suite of scripts/test.sh runs a part: the rest is marked `full`, and fixtures
compute what the selected tests ask for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest

Layouts = Mapping[int, Mapping[str, list[str]]]
"""Number of ranks -> name of a layout -> overrides."""


def swept(cases: Iterable[Any], brief: Collection[Any]) -> list[Any]:
    """The cases as parameters; those that are not in `brief` are for scripts/test_full.sh.

    Args:
        cases: Values, or tuples of the values of several parameters.
        brief: Some of them.
    """
    cases = list(cases)
    unknown = [case for case in brief if case not in cases]
    assert not unknown, unknown
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in brief else pytest.mark.full,
        )
        for case in cases
    ]


def asked(request: pytest.FixtureRequest, *names: str) -> set[Any]:
    """Values that the selected tests of this module have for a parameter; tuples of values where
    `names` are several.
    """
    found = set()
    for item in request.session.items:
        # set by pytest for a test that has parameters
        given = vars(item)["callspec"].params if "callspec" in vars(item) else {}
        if item.path == request.path and all(name in given for name in names):
            values = tuple(given[name] for name in names)
            found.add(values if len(names) > 1 else values[0])
    return found


def only(layouts: Layouts, names: Collection[str]) -> dict[int, dict[str, list[str]]]:
    """The layouts of these names, and the one of one rank that the others are compared with."""
    found = {
        size: {name: words for name, words in own.items() if name in names or name == "one"}
        for size, own in layouts.items()
    }
    return {size: own for size, own in found.items() if own}
