"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from spmdrl.models.kernels.row_kernels import rows_for


def rope_tables(
    positions: Tensor,  # [T] int64
    frequencies: Tensor,  # [d / 2] float32, of `inverse_frequencies`
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin for `rotate`, each [T, 1, d] float32, times `factor`."""
    angles = positions[:, None, None].float() * frequencies  # [T, 1, d / 2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(
    x: Tensor,  # [T, H, d]
    cos: Tensor,  # [T, 1, d]
    sin: Tensor,  # [T, 1, d], the first half negated
) -> Tensor:
    """Apply rotary embedding (Su et al. 2021) to all heads, pairing dim i with i + d / 2.

    The result is x cos + swap(x) sin, in float32; `sin` holds the sign of the half-rotation.
    """
    if rows := rows_for(x, cos, sin):
        return rows.rotate(x, cos, sin)
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
