"""Figures of the house: rooms, levels, sizes of files and functions (`scripts/dev/house.py`)."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

MOST = {
    "loose_modules": 7,
    "circles": 0,
    "levels": 11,
    "config_and_role_functions": 0,
    "largest_file": 400,
    "longest_function": 60,
    "docstring_fragments": 0,
    "files_for_one_grpo_step": 10,
    "import_closure_of_grpo": 0.5,
    "basic_keys": 60,
}


def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "scripts" / "dev" / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = house().figures(ROOT, traced=False)
    return found


@pytest.mark.parametrize("name", MOST)
def test_the_house_keeps_its_measures(figures: dict[str, Any], name: str) -> None:
    assert figures[name] is not None and figures[name] <= MOST[name], (name, figures[name])


def test_a_function_of_a_configuration_and_a_role_is_seen() -> None:
    seen = house().takes_config_and_role
    [spec, both] = ast.parse(
        "def f(config: Config, spec: RoleSpec): ...\ndef g(config: Config, *, role: str): ..."
    ).body
    assert not seen(spec) and seen(both)
