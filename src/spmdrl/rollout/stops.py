"""Conditions that end a sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spmdrl.models.files.token_texts import Decode, TokenTexts
from spmdrl.rollout.protocol import Finish, SamplingParams

_CONTEXT = 8
"""Tokens decoded before those that can hold a stop text, so that its first letters are complete."""

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Replacement for bytes that do not form a complete character yet."""


class StopRules:
    """End conditions of requests. Findings about tokens are kept and serve all later requests too.

    Args:
        eos: the model's ends of text.
        texts: the texts of tokens, needed for stop texts.
    """

    def __init__(self, eos: Sequence[int], texts: TokenTexts | None) -> None:
        self._eos, self._texts = frozenset(eos), texts
        self._finders: dict[tuple[str, ...], StopTexts] = {}
        self._watched: dict[tuple[frozenset[int], StopTexts | None], NDArray[np.bool_]] = {}

    def of(self, sampling: SamplingParams) -> StopRule:
        finder = None
        if sampling.stop and self._texts is not None:
            if sampling.stop not in self._finders:
                self._finders[sampling.stop] = StopTexts(sampling.stop, self._texts)
            finder = self._finders[sampling.stop]
        return StopRule(sampling, self._eos, finder)

    def watched(self, rule: StopRule, vocab_size: int) -> NDArray[np.bool_]:
        """Return the tokens that may end a sample by this rule, bool [V]: with stop texts all that
        nobody has unmarked, because `StopRule.may_stop` was false for them.
        """
        key = rule.ids, rule.texts
        if key not in self._watched:
            marks = np.full(vocab_size, rule.texts is not None)
            marks[[token for token in rule.ids if token < vocab_size]] = True
            self._watched[key] = marks
        return self._watched[key]


class StopRule:
    """The end conditions of one request.

    Args:
        eos: the model's ends of text.
        texts: the finder of the request's stop texts, or a decoder of tokens if no token is
            special; None if there are no stop texts.
    """

    def __init__(
        self, sampling: SamplingParams, eos: Iterable[int], texts: StopTexts | Decode | None
    ) -> None:
        if texts is not None and not isinstance(texts, StopTexts):
            decoded = TokenTexts(decode=texts, decode_all=texts)
            texts = StopTexts(sampling.stop, decoded) if sampling.stop else None
        self.texts, self._max_tokens = texts, sampling.max_tokens
        self.ids = frozenset(sampling.stop_token_ids)
        if texts is not None:
            self.ids |= texts.ids
        if not sampling.ignore_eos:
            self.ids |= frozenset(eos)

    def most(self, limit: int | None) -> int:
        """Return the most tokens of a sample or turn; `limit` in place of `sampling.max_tokens`."""
        return limit or self._max_tokens

    def may_stop(self, token: int) -> bool:
        """Whether a token can end a sample, whatever precedes it."""
        return token in self.ids or (self.texts is not None and self.texts.may_end(token))

    def check(
        self, tokens: list[int], num_generated: int, limit: int | None = None
    ) -> Finish | None:
        """Return the reason if the newest of `tokens` (prompt and generated) ends the sample, or a
        turn of it.

        Args:
            num_generated: number of tokens of the sample or turn so far.
            limit: most tokens in place of `sampling.max_tokens`.
        """
        if tokens[-1] in self.ids:
            return Finish.STOP
        if self.texts is not None and self.texts.end(tokens, num_generated):
            return Finish.STOP
        return Finish.LENGTH if num_generated >= self.most(limit) else None


class StopTexts:
    """Stop texts: whether generated tokens end with one of them, and the text before it.

    A special token ends a sample by its id. A stop text that contains a special token is searched
    for in text with special tokens, any other one in text without them, as reward functions see it.
    """

    def __init__(self, stop: Sequence[str], texts: TokenTexts) -> None:
        self._texts = texts
        self.ids = frozenset(texts.special[text] for text in stop if text in texts.special)
        special = [t for t in stop if any(token in t for token in texts.special)]
        plain = [text for text in stop if text not in special]
        self._finders = [
            _Finder(tuple(some), decode)
            for some, decode in ((plain, texts.decode), (special, texts.decode_all))
            if some
        ]
        self._plain, self._special = plain, special

    def end(self, tokens: Sequence[int], num_generated: int) -> bool:
        """Whether the newest token completes a stop text in the generated tokens."""
        return any(finder.end(tokens, num_generated) for finder in self._finders)

    def may_end(self, token: int) -> bool:
        """Whether a token can complete a stop text."""
        return any(finder.may_end(token) for finder in self._finders)

    def before(self, tokens: Sequence[int]) -> str:
        """Return the text of a response up to the first stop text, without special tokens."""
        place = next((i for i, token in enumerate(tokens) if token in self.ids), len(tokens))
        tokens = tokens[:place]
        text = cut_at(self._texts.decode(tokens), self._plain)
        written = self._texts.decode_all(tokens) if self._special else ""
        kept = cut_at(written, self._special)
        if kept == written:
            return text
        for token in self._texts.special:
            kept = kept.replace(token, "")
        return min(text, kept, key=len)


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the first stop string in it."""
    ends = [place for s in stop if (place := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


@dataclass(frozen=True, kw_only=True)
class _Token:
    """Args:
    may_end: whether a stop text can end within its letters.
    is_blank: whether it has no letters.
    is_fragment: whether it is a part of a character.
    """

    may_end: bool
    is_blank: bool
    is_fragment: bool


class _Finder:
    """Finder of texts at the end of tokens; it decodes only if a token may complete one."""

    def __init__(self, stop: tuple[str, ...], decode: Decode) -> None:
        self._stop, self._decode = stop, decode
        self._known: dict[int, _Token] = {}
        self._fragment: int | None = None  # some token that is a part of a character
        self._in_runs: dict[int, bool] = {}
        # A token with letters has at least one byte: a text spans at most as many as it has bytes.
        self._tail = max(len(text.encode(errors="surrogatepass")) for text in stop) + _CONTEXT

    def may_end(self, token: int) -> bool:
        return self._look_up(token).may_end

    def end(self, tokens: Sequence[int], num_generated: int) -> bool:
        if not self._look_up(tokens[-1]).may_end:
            return False
        first, start, lacking = len(tokens) - num_generated, len(tokens), self._tail
        while start > first and lacking > 0:
            start -= 1
            lacking -= not self._look_up(tokens[start]).is_blank
        while start > first and self._is_in_run(tokens[start - 1]):
            start -= 1
        tail = self._decode(tokens[start:])
        return any(text in tail for text in self._stop)

    def _is_in_run(self, token: int) -> bool:
        """Whether its letters depend on neighbouring fragments: Llama 2's single bytes are text
        only if a run of them makes whole characters, so a tail must not begin inside a run.
        """
        if self._look_up(token).is_fragment:
            return True
        if self._fragment is None:
            return False
        if token not in self._in_runs:
            single, behind = self._decode([token]), self._decode([self._fragment, token])
            self._in_runs[token] = not behind.endswith(single)
        return self._in_runs[token]

    def _look_up(self, token: int) -> _Token:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._examine(token)
            self._fragment = token if found.is_fragment else self._fragment
        return found

    def _examine(self, token: int) -> _Token:
        """Examine its letters, both by itself and after another token: decoders drop a first
        blank, or a prefix that marks the rest of a word.
        """
        single, twice = self._decode([token]), self._decode([token, token])
        is_fragment = _UNKNOWN in twice
        if is_fragment or not twice.startswith(single):
            return _Token(may_end=True, is_blank=False, is_fragment=is_fragment)
        behind = twice[len(single) :]
        may_end = any(_may_end(text, own) for text in self._stop for own in (single, behind))
        return _Token(may_end=may_end, is_blank=not twice, is_fragment=False)


def _may_end(text: str, letters: str) -> bool:
    """Whether `text` can end within `letters`, whatever precedes them."""
    most = min(len(text), len(letters))
    return text in letters or any(letters.startswith(text[-k:]) for k in range(1, most + 1))
