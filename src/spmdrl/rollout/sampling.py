"""`SamplingParams`: the options by which one request's tokens are drawn."""

from __future__ import annotations

from spmdrl.config.sections import SamplingSection

MAX_SUPPORT = 256
"""Most tokens that truncation may leave if their ids are to be recorded, and a log-probability is
to be that of the softmax over them. If more are left, the softmax is that over all tokens."""


class SamplingParams(SamplingSection):
    """Options of truncated sampling, conditions that end a completion, and what to report of it.

    The truncations apply in the order of `transformers`: temperature, top-k, top-p (on the
    distribution that top-k leaves), min-p; the rest is renormalised. A stop text may end within the
    last token. A token of `stop_token_ids` that ends a completion is part of it and has a
    log-probability.

    Args:
        ignore_eos: do not end at the model's ends of text.
        margins: also report how close every draw was to a different result.
        experts: also report the experts that every token was routed to.
        support: also report the tokens that each token was drawn from, if truncation leaves at
            most `MAX_SUPPORT` of them.
    """

    ignore_eos: bool = False
    margins: bool = False
    experts: bool = False
    support: bool = False

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens with a probability above 0 cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0
