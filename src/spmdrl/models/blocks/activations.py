"""Gated activations: what a gate's half and the other half of a projection become."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models.fused import swiglu
from spmdrl.models.specs import ClampedSwiglu

_SILU = ("silu", "swish")


def gated(
    gate_up: Tensor,  # [T, 2 W], side by side
    activation: str | ClampedSwiglu,
) -> Tensor:  # [T, W]
    """Compute activation(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Raises:
        ValueError: `transformers` knows no activation of that name.
    """
    if activation in _SILU:
        return swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return gated_halves(gate, up, activation)


def gated_halves(
    gate: Tensor,  # [T, W]
    up: Tensor,  # [T, W]
    activation: str | ClampedSwiglu,
) -> Tensor:  # [T, W]
    """Compute `gated` of halves that do not lie side by side."""
    if isinstance(activation, ClampedSwiglu):
        alpha, limit = activation.alpha, activation.limit
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)
    return activation_function(activation)(gate) * up


@cache
def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation by its name in `transformers` (`ACT2FN`).

    Raises:
        ValueError: there is none of that name.
    """
    if name in _SILU:
        return F.silu
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"hidden_act={name!r} is not supported: transformers knows none such")
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found
