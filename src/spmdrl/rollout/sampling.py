"""`SamplingParams`: how one request's tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SUPPORT = 256
"""Tokens that truncation may leave for their ids to be recorded, and for the log-probability to be
that of the softmax over them. Where more are left, it is that of the softmax over all tokens."""

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 1000.0
"""Beyond them logits overflow, or hardly differ; 0 is greedy."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Truncated sampling, and where a completion ends.

    The truncations apply in the order of `transformers`: temperature, top-k, top-p (on the
    distribution that top-k leaves), min-p; what is left is renormalised.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: the smallest set of most likely tokens whose probability reaches it.
        top_k: that many most likely tokens; 0 is all.
        min_p: tokens at least that likely relative to the most likely one.
        max_tokens: tokens of a completion at most.
        stop: texts that end a completion; the last token may carry text beyond.
        stop_token_ids: tokens that end a completion, besides the model's ends of text. The token
            that ends it is part of it and has a log-probability.
        ignore_eos: do not end at the model's ends of text.
        margins: also report how near every draw was to falling otherwise.
        experts: also report which experts every token went to.
        support: also report the tokens that each token was drawn from, where truncation leaves at
            most `MAX_SUPPORT` of them.

    Raises:
        ValueError: a value outside its range, naming it.
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
        """True where some token with a probability may not be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0
