"""The stand-in device and the product do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
OWN = (
    "stand_in.py",
    "host_math.py",
    "host_operations.py",
    "calculations.py",
    "mirrors.py",
    "races.py",
    "site/sitecustomize.py",
)


def imported(path: Path) -> set[str]:
    """First words of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found |= {alias.name.split(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module)):
                found.add(module.split(".")[0])
    return found


def test_the_stand_in_imports_nothing_of_the_product() -> None:
    found = {name: imported(HERE / name) for name in OWN}
    assert "torch" in found["host_math.py"]
    assert not [name for name, modules in found.items() if "spmdrl" in modules]


def test_the_product_does_not_know_the_stand_in() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert files
    texts = {path: path.read_text() for path in files}
    assert not [p for p, t in texts.items() if "fake_gpu" in t.lower() or "stand_in" in t]
