"""Kernels in Triton on the stand-in device: launched without a wait, and captured."""

from __future__ import annotations

import pytest
import torch
from test_budgets_cuda import measure, over

from spmdrl.models.kernels import gpu

pytestmark = pytest.mark.fakegpu

LAUNCHES = {
    "decode": 1,
    "cascade": 1,
    "projected": 1,
    "sampling": 2,
    "norm": 1,
    "norm_backward": 2,
    "products": 1,
    "products_backward": 1,
    "rope": 1,
    "rope_backward": 1,
    "laid_out": 2,
    "laid_out_backward": 2,
}


def test_a_call_is_its_launches_alone_and_can_be_captured() -> None:
    found = measure(file="kernel_figures.py")
    assert found == {name: [number, number, {}] for name, number in LAUNCHES.items()}


UPDATE = {
    "peak_gb": 45.5,
    "microbatch_launches": 1515,
    "microbatch_syncs": 0,
    "microbatch_pageable_h2d": 0,
    "left_gb": 0.07,
    "elementwise_gb": 60,
}
"""The most of an update with the kernels, of the shapes of a 1.5B model (`figures.py`)."""


def test_a_microbatchs_elementwise_passes_touch_sixty_gigabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(gpu.SWITCH, "1")
    found = measure("update")
    print(found)
    assert over(found, UPDATE) == {}
    assert found["gb_by_kernel"].keys() >= {"lay_out_backward", "add_rms_norm_backward"}


LAYERS, OTHERS = 28, 17
"""Layers of the model of `figures.py`; nodes of a decode step's graph that are no layer's, at most:
the head's product and the draws are among them.
"""

STEP = {"launches": 3, "syncs": 1, "h2d": 0, "d2h": 1, "pageable": 0, "illegal": 0}
"""The most that a decode step asks whose graph draws its tokens."""


@pytest.mark.parametrize("figure", ["decode", "together"])
def test_a_layer_of_a_decode_step_is_nine_nodes(
    monkeypatch: pytest.MonkeyPatch, figure: str
) -> None:
    """Prompts that samples read together make no launch more."""
    monkeypatch.setenv(gpu.SWITCH, "1")
    found = measure(figure)
    print(found)
    assert found["graph_nodes"] <= 9 * LAYERS + OTHERS, found
    assert over(found, STEP) == {}


VOCABULARY, SLICES = 151936, 38
"""Logits of a row of `drawing_figures.py`, and the kernel's slices of it."""


def test_the_kernel_reads_the_logits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operations pass over them again and again, in chunks of rows."""
    by_torch = measure(file="drawing_figures.py")
    monkeypatch.setenv(gpu.SWITCH, "1")
    found = measure(file="drawing_figures.py")
    print(by_torch, found)
    for rows in (64, 256):
        own, others = found[str(rows)], by_torch[str(rows)]
        assert (own["launches"], own["syncs"]) == (2, 0) and others["launches"] >= 19
        slices = 2 * 24 * rows * SLICES  # written and read
        assert own["gb"] <= (4 * rows * VOCABULARY + slices + 64 * rows) / 1e9 + 1e-3
        assert others["gb"] > 15 * own["gb"]


COMPILED = {
    "peak_gb": 46,
    "microbatch_launches": 1680,
    "microbatch_syncs": 0,
    "microbatch_pageable_h2d": 0,
    "left_gb": 0.07,
    "elementwise_gb": 141,
}
"""The most of the same update with compiled layers, and without the kernels."""


@pytest.mark.skipif(torch.__version__ < "2.13", reason="train.compile needs torch 2.13")
def test_compiled_layers_launch_and_touch_less_than_torchs_operations() -> None:
    found = measure("compiled")
    print(found)
    assert over(found, COMPILED) == {}
    assert 40 < found["gb_by_kernel"]["compiled"] < 47
    # gradients are added to their sums in place
    assert not {"clone", "copy_"} & found["gb_by_operation"].keys()
