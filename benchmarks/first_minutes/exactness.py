"""Stage `exactness`: what must be equal on CPU and GPU, and how far rounding goes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from first_minutes.cases import Case, Outcome, Setting
from spmdrl.keyed_random import Noise, key_tensor

_ULP = 2.0**-23
_BF16_HALF = 2.0**-8
"""Largest relative error of rounding to bfloat16, whose significands have 8 bits."""


def cases(setting: Setting) -> Iterator[Case]:
    yield Case(name="noise, CPU against GPU", run=lambda: noise(setting))
    yield Case(name="logits, bfloat16 against float32", run=lambda: logits(setting))


def noise(setting: Setting) -> Outcome:
    """Compare the sampling noise: hashes are integers, so only the logarithm may differ.

    CUDA's logf and log1pf have at most 1 ulp (CUDA C++ Programming Guide, mathematical functions),
    the CPU's as much, and u itself is exact.
    """
    vocabulary = 1000 if setting.small else 151936
    keys = [1, -5, 2**60]
    found = []
    for device in (torch.device("cpu"), setting.device):
        values = Noise(0, vocabulary, device).exponential(key_tensor(keys, device))
        found.append(values.cpu().double())
    gap = (found[0] - found[1]).abs() / found[0].abs().clamp(min=1e-30)
    return Outcome(
        predicted={"largest_relative_gap": 2 * _ULP},
        measured={"largest_relative_gap": float(gap.max())},
        facts={"draws": found[0].numel(), "unequal": int((gap > 0).sum())},
    )


def logits(setting: Setting) -> Outcome:
    """Compare the head's product in bfloat16 and in float32 with float64.

    The prediction for bfloat16 is the rounding of the largest logit; for float32 it is the usual
    growth of a sum's error with the root of its length.
    """
    rows, width, vocabulary = (8, 64, 256) if setting.small else (512, 1536, 4096)
    hidden = torch.randn(rows, width, device=setting.device).bfloat16()
    weight = torch.randn(vocabulary, width, device=setting.device).bfloat16()
    exact = hidden.double() @ weight.double().t()
    narrow = (hidden @ weight.t()).double()
    wide = torch.mm(hidden, weight.t(), out_dtype=torch.float32).double()
    largest = float(exact.abs().max())
    return Outcome(
        predicted={
            "bf16_error": largest * _BF16_HALF,
            "fp32_error": largest * _ULP * width**0.5,
        },
        measured={
            "bf16_error": float((narrow - exact).abs().max()),
            "fp32_error": float((wide - exact).abs().max()),
        },
        facts={"largest_logit": round(largest, 1)},
    )
