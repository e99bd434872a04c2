"""Budgets of the CUDA path: what a decode step, a microbatch, an optimizer step and a colocated
step ask of the device, and what a release leaves. A figure that grows fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.fakegpu,
    pytest.mark.skipif(
        torch.__version__ < "2.13", reason="the figures are those of torch 2.13's operators"
    ),
]

BUDGETS: dict[str, dict[str, float]] = {
    "decode": {
        "syncs": 1,
        "launches": 24,
        "graph_nodes": 630,
        "h2d": 0,
        "d2h": 1,
        "pageable": 0,
        "illegal": 0,
    },
    "adapted": {
        "syncs": 1,
        "launches": 24,
        "graph_nodes": 938,
        "h2d": 0,
        "d2h": 1,
        "pageable": 0,
        "illegal": 0,
    },
    "by_row": {"syncs": 1, "launches": 24, "graph_nodes": 1470, "h2d": 0, "d2h": 1, "illegal": 0},
    "capture": {"captures": 8, "device_syncs": 0, "frees": 0, "pool_gb": 0.03, "illegal": 0},
    "release": {"peak_gb": 3.18, "left_gb": 0.152, "left_after_gc_gb": 0.152},
    "update": {
        "states_gb": 21.62,
        "peak_gb": 49.7,
        "microbatch_launches": 2380,
        "microbatch_syncs": 0,
        "microbatch_pageable_h2d": 0,
        "optimizer_launches": 57,
        "optimizer_syncs": 1,
        "left_gb": 0.07,
        "moved_gb": 310,
        "elementwise_gb": 205,
    },
}
"""Figure -> name -> the most that it may be, of the shapes of a 1.5B model (`figures.py`)."""

GB_BY_OPERATION = {"mm": 76.8, "mul": 57.0, "add": 36.5, "_to_copy": 17.9, "cat": 18.8}
"""The most bytes of a microbatch that its largest operations may touch, in GB."""

QUICK = ("decode", "release")


RECURRENT = {"forward_launches": 931, "launches": 3287, "syncs": 1, "pageable": 0, "gb": 5.8}
"""The same of `delta_figures.py`."""


def measure(*words: str, file: str = "figures.py") -> dict[str, Any]:
    """Figures that a file finds in a process of its own, in which nothing is computed."""
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).parent / file), *words],
        env={**os.environ, "FAKE_GPU_VALUES": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def over(found: dict[str, Any], most: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Names of the figures above their budget, with both."""
    return {name: (found[name], most[name]) for name in most if found[name] > most[name]}


@pytest.mark.parametrize(
    "figure", [pytest.param(f, marks=[pytest.mark.quick] if f in QUICK else []) for f in BUDGETS]
)
def test_no_figure_is_above_its_budget(figure: str) -> None:
    found = measure(figure)
    print(found)
    assert over(found, BUDGETS[figure]) == {}
    if figure == "update":
        assert over(found["gb_by_operation"], GB_BY_OPERATION) == {}


def test_layers_of_the_gated_delta_rule_wait_for_nothing_and_have_the_memory_of_the_plan():
    found = measure(file="delta_figures.py")
    print(found)
    assert over(found, RECURRENT) == {}
    assert all(1 / 1.65 <= found[name] <= 1 for name in ("forward_of_planned", "of_planned"))


FAULTS = {
    "synchronisation": ("decode", "syncs"),
    "launch": ("decode", "launches"),
    "cycle": ("release", "left_gb"),
    "hook": ("update", "left_gb"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_above_the_budget(fault: str) -> None:
    figure, name = FAULTS[fault]
    assert name in over(measure(figure, "--fault", fault), BUDGETS[figure])
