"""Sums of token metrics, in the form that `algorithms.metrics` combines."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spmdrl.algorithms.metrics import TOKENS, is_max


def metric_sums(
    values: Mapping[str, Tensor],  # [N] each
    live: Tensor,  # [N] bool: the tokens that count
) -> dict[str, Tensor]:
    """Sum each metric over the live tokens (or take its maximum) and count them as `tokens`.

    Sums are float64 and without gradient; nothing waits for the device.
    """
    sums = {TOKENS: live.sum(dtype=torch.float64)}
    for name, value in values.items():
        kept = torch.where(live, value.detach().double(), 0.0)
        # A microbatch can be empty, and the maximum of no values is an error: add a 0.
        sums[name] = torch.cat([kept, kept.new_zeros(1)]).amax() if is_max(name) else kept.sum()
    return sums
