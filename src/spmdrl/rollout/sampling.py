"""`SamplingParams`: the options by which one request's tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SUPPORT = 256
"""Most tokens that truncation may leave if their ids are to be recorded, and a log-probability is
to be that of the softmax over them. If more are left, the softmax is that over all tokens."""

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 1000.0
"""Limits beyond which logits overflow or hardly differ; 0 is greedy."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of truncated sampling, and conditions that end a completion.

    The truncations apply in the order of `transformers`: temperature, top-k, top-p (on the
    distribution that top-k leaves), min-p; the rest is renormalised.

    Args:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_p: keep the smallest set of most likely tokens whose probability reaches it.
        top_k: keep this many of the most likely tokens; 0 keeps all.
        min_p: keep tokens that are at least this likely relative to the most likely one.
        max_tokens: largest number of tokens in a completion.
        stop: texts that end a completion; the last token may hold text beyond the stop text.
        stop_token_ids: tokens that end a completion, as well as the model's ends of text. The token
            that ends it is part of it and has a log-probability.
        ignore_eos: do not end at the model's ends of text.
        margins: also report how close every draw was to a different result.
        experts: also report the experts that every token was routed to.
        support: also report the tokens that each token was drawn from, if truncation leaves at
            most `MAX_SUPPORT` of them.

    Raises:
        ValueError: a value is outside its range; the message names it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    margins: bool = False
    experts: bool = False
    support: bool = False

    def __post_init__(self) -> None:
        rules = {
            "temperature": (
                self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE,
                self.temperature,
                f"0 (greedy) or between {LEAST_TEMPERATURE} and {MOST_TEMPERATURE}",
            ),
            "top_p": (0 < self.top_p <= 1, self.top_p, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, self.top_k, "at least 0 (0: all tokens)"),
            "min_p": (0 <= self.min_p < 1, self.min_p, "at least 0 and below 1"),
            "max_tokens": (self.max_tokens >= 1, self.max_tokens, "at least 1"),
            "stop": (all(self.stop), self.stop, "without empty texts"),
        }
        for name, (good, value, wish) in rules.items():
            if not good:
                raise ValueError(f"sampling.{name}={value!r}: it must be {wish}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens with a probability above 0 cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0
