"""When a sample ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .protocol import Finish
from .sampling import SamplingParams

Detokenize = Callable[[Sequence[int]], str]

_CONTEXT = 8
"""Tokens decoded before the ones that can hold a stop text, so that its first letters are whole."""


class StopRule:
    """The end conditions of one request.

    Args:
        eos: the model's ends of text.
        detokenize: token ids to text; needed for stop texts.
    """

    def __init__(
        self, sampling: SamplingParams, eos: Sequence[int], detokenize: Detokenize | None
    ) -> None:
        self._ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            self._ids |= frozenset(eos)
        self._max_tokens = sampling.max_tokens
        self._texts = sampling.stop
        self._detokenize = detokenize
        # A token is at least one byte, so the text lies within as many tokens as it has bytes.
        self._tail = max((len(text.encode()) for text in sampling.stop), default=0) + _CONTEXT

    def check(self, tokens: list[int], num_generated: int) -> Finish | None:
        """Whether the newest of `tokens` (prompt and generated) ends the sample."""
        if tokens[-1] in self._ids:
            return "stop"
        if self._texts and self._detokenize is not None:
            tail = self._detokenize(tokens[-min(num_generated, self._tail) :])
            if any(text in tail for text in self._texts):
                return "stop"
        return "length" if num_generated >= self._max_tokens else None
