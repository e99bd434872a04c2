"""Kernels around parts of the sampling kernel, so that a test sees their values."""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.kernels.cuda.language import kernel, tl
from spmdrl.models.kernels.cuda.sampling import exponential, negative_log1m


@kernel
def write_noise(out: tl.tensor, key: tl.tensor, start: tl.tensor, SIZE: tl.constexpr) -> None:
    token = tl.arange(0, SIZE)
    whole = tl.load(key)
    low, high = whole.to(tl.int32), (whole >> 32).to(tl.int32) | 1
    tl.store(out + token, exponential(token + start, low, high))


@kernel
def write_logs(out: tl.tensor, u: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    tl.store(out + at, negative_log1m(tl.load(u + at)))


def noise(key: Tensor, start: int, size: int) -> Tensor:  # key [1] int64
    out = torch.empty(size, dtype=torch.float32)
    write_noise[(1,)](out, key, start, SIZE=size)
    return out


def logs(u: Tensor) -> Tensor:
    out = torch.empty_like(u)
    write_logs[(1,)](out, u, SIZE=len(u))
    return out
