"""The loss of supervised fine-tuning, as an unnormalised sum."""

from __future__ import annotations

from torch import Tensor

from spmdrl.algorithms.kl import at_least_float32
from spmdrl.algorithms.packed import metric_sums


def next_token_loss(
    logprobs: Tensor,  # [N] of the target tokens, with gradient
    weights: Tensor,  # [N] from `loss_weights`; 0: the token counts nowhere
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of weights * -log p(token), with sums of metrics.

    Metrics (float64 sums over tokens of non-zero weight; see `algorithms.metrics`): tokens, nll
    (nats, without the weights, so that exp of its mean is the perplexity).
    """
    logprobs, weights = at_least_float32(logprobs), at_least_float32(weights)
    return -(weights * logprobs).sum(), metric_sums({"nll": -logprobs}, weights != 0)
