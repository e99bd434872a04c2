"""Soft cap c tanh(z / c) of logits (Gemma 2: https://arxiv.org/abs/2408.00118, section 2)."""

from __future__ import annotations

from torch import Tensor


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Cap logits in place; None: leave them as they are."""
    if softcap is None:
        return logits
    return logits.div_(softcap).tanh_().mul_(softcap)


def cap_slope(capped: Tensor, softcap: float) -> Tensor:
    """Compute the derivative of capped logits by those before the cap, 1 - (capped / c)^2."""
    return capped.div(softcap).square_().neg_().add_(1)
