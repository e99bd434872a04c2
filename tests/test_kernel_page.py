"""The predictions on the page of kernels are those of the arithmetic that it names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str = "kernel_predictions") -> ModuleType:
    path = ROOT / "scripts" / "dev" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("name", ["kernel_predictions", "shared_prompt_reads"])
def test_the_page_has_the_scripts_tables(name: str) -> None:
    pytest.importorskip("triton")
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in script(name).tables() if line and line not in page] == []


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
    # of eight samples, three read together: the prompt of 512 is read three times
    assert module.decode_bytes(small, 8, 3)[1] == 4 * (8 * 512 + 3 * 512) * 8 * 3


def test_reads_of_a_small_group() -> None:
    """Two responses of 128 rows after a prompt of 128, one head: each tile is a block."""
    module = script("shared_prompt_reads")
    group = module.Group(heads=1, kv_heads=1, dims=8, prompt=128, responses=2, response=128)
    # prompt, then each response: the prompt's block and its own
    block = 128 * 2 * 2 * 8
    assert [group.tile_bytes(way) for way in module.WAYS] == [5 * block] * 3
    # passes over rows as wide as queries, over keys with values, and to lay these out
    q, kv, rows = 2 * 8, 4 * 8, 3 * 128
    once = rows * (15 * q + 11 * kv) + 3 * rows * kv
    assert group.moved_bytes("one stream") == once
    assert group.moved_bytes("repeated") == once + 2 * 128 * (11 + 2) * kv
    two = 256 * 15 * q + 128 * 11 * kv + 11 * 256 * q + 3 * 128 * kv
    assert group.moved_bytes("two calls") == once + two
