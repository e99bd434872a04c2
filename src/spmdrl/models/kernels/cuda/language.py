"""Triton as the kernels here use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton import language as tl

__all__ = ["kernel", "power_of_2", "tl"]


def kernel(function: Callable[..., Any]) -> Any:
    """Make a function a kernel, or a part of one; an interpreted one under `TRITON_INTERPRET=1`."""
    return triton.jit(function)


def power_of_2(n: int) -> int:
    """Return the least power of two that is not below n: all sizes of a kernel's tensors are."""
    return 1 << max(0, n - 1).bit_length()
