"""The public faces: lazy, complete, typed, and with signatures that change by decision only."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from api_signatures import FACES, FILE, text
from spmdrl import api
from spmdrl.api import backends

SOURCE = Path(__file__).parents[1] / "src" / "spmdrl"

PARTS = ("reference_sums", "pair_verdicts")
"""Files of the room that flows ask by one name of the face; nobody copies them."""

FLOWS = [p for p in sorted((SOURCE / "flows").glob("*.py")) if p.stem not in PARTS]
"""Files that a user copies; `reference_sums` writes a file of the project, and is only called."""


def imported(path: Path) -> list[tuple[str, str, str]]:
    """Names imported from this project: (module, name, name here)."""
    return [
        (node.module, alias.name, alias.asname or alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spmdrl")
        for alias in node.names
    ]


def test_signatures_are_those_on_file() -> None:
    """A change is a decision: it goes into CHANGELOG.md, and this rewrites the file:

    PYTHONPATH=src python tests/api_signatures.py
    """
    assert text() == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_type_checkers_see_the_same_names(face: Any) -> None:
    here = imported(Path(face.__file__))
    typed = {name: module for module, name, own in here if module != "spmdrl.api.lazy"}
    assert all(name == own for _, name, own in here)
    found = {name: f"spmdrl.{module}" for name, module in face._PLACES.items()}
    assert found == typed
    assert list(face.__all__) == sorted(found) == dir(face)


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_the_docstring_groups_every_name_once(face: Any) -> None:
    assert face.__doc__ is not None
    listed = face.__doc__.partition("\n\n- ")[2]  # what stands before tells of the other face
    assert sorted(re.findall(r"`(\w+)`", listed)) == face.__all__


@pytest.mark.parametrize(
    ("face", "name"), [(face, name) for face in FACES for name in face.__all__]
)
def test_names_exist(face: Any, name: str) -> None:
    module = importlib.import_module(f"spmdrl.{face._PLACES[name]}")
    assert getattr(face, name) is vars(module)[name]


def test_a_name_has_one_face() -> None:
    assert not set(api.__all__) & set(backends.__all__)


def test_other_names_are_refused() -> None:
    assert not hasattr(api, "Nothing")
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from spmdrl.api import Nothing  # noqa: F401


@pytest.mark.parametrize("path", FLOWS, ids=lambda path: path.stem)
def test_a_copied_flow_finds_its_imports(path: Path) -> None:
    for module, name, _ in imported(path):
        assert name in api.__all__, f"{path.name} imports {name}: add it to spmdrl.api"
        assert getattr(api, name) is vars(importlib.import_module(module))[name]
