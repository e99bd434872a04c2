"""Kernels in Triton on the stand-in device: launched without a wait, and captured."""

from __future__ import annotations

import pytest
from test_budgets_cuda import measure

pytestmark = pytest.mark.fakegpu

LAUNCHES = {
    "decode": 1,
    "projected": 1,
    "sampling": 2,
    "norm": 1,
    "products": 1,
    "products_backward": 1,
    "rope": 1,
    "rope_backward": 1,
}


def test_a_call_is_its_launches_alone_and_can_be_captured() -> None:
    found = measure(file="kernel_figures.py")
    assert found == {name: [number, number, {}] for name, number in LAUNCHES.items()}
