"""The predictions on the page of kernels are those of the arithmetic that it names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def script() -> ModuleType:
    path = ROOT / "scripts" / "dev" / "kernel_predictions.py"
    spec = importlib.util.spec_from_file_location("kernel_predictions", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def test_the_page_has_the_scripts_tables() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in script().tables() if line and line not in page] == []


def test_bytes_of_a_small_case() -> None:
    """Weights once, keys and values of every row, and of experts those that are drawn."""
    module = script()
    small = module.Sizes(
        heads=2,
        kv_heads=1,
        dims=8,
        width=16,
        layers=3,
        hidden=4,
        vocabulary=10,
        fixed=100.0,
        experts=4,
        chosen=1,
        expert=8.0,
    )
    assert small.read(1) == 108.0 and abs(small.read(2) - (100 + 8 * 4 * (1 - 0.75**2))) < 1e-9
    weights, keys, _ = module.decode_bytes(small, 1)
    assert weights == 216.0 and keys == 4 * 1024 * 8 * 3
