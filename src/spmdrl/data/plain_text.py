"""Text that stays text: contents of messages yield no added token, whatever they spell.

Tokenizers look for the texts of their added tokens (`<|im_end|>`, `<think>`) before anything else,
so the content of a message could end a turn. Before rendering, each such text in a content is
broken by a mark, a letter for private use: templates may trim, escape or test the content and find
no added token in it. In the rendered text the tokenizer then finds only those that the template
wrote. These are replaced by letters for private use that a copy of the tokenizer knows as the same
tokens, the marks are removed, and the copy encodes the text as one. A text without marks is encoded
by the tokenizer itself.

Runs of white space and single letters that are added tokens stay: they are how the tokenizer writes
this text, and mark nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from spmdrl.data.row_problems import BadRow

_MARKS = range(0xE000, 0xF900)
_STAND_INS = (0xF0000, 0x100000)
"""First letters of two planes for private use."""


@dataclass(frozen=True)
class Mark:
    """Letter that breaks added tokens in a conversation; "": none has to be broken."""

    letter: str = ""

    def removed(self, text: str) -> str:
        """Return the text without marks, also where a template wrote them as JSON escapes."""
        if not self.letter:
            return text
        return text.replace(self.letter, "").replace(_escaped(self.letter), "")


NO_MARK = Mark()


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """Args:
    core: the tokenizer with its added tokens spelled as single letters.
    letters: letter of each added token, by its id in the tokenizer.
    ids: id in the tokenizer of each added token, by its id in the copy.
    """

    core: Any
    letters: Mapping[int, str]
    ids: Mapping[int, int]


@dataclass(frozen=True)
class PlainText:
    """Breaks the added tokens that contents spell, and encodes texts in which some are broken.

    Args:
        tokenizer: a `transformers` tokenizer.
    """

    tokenizer: Any

    @cached_property
    def added(self) -> Mapping[int, Any]:
        """Added tokens that could mark something, by their ids."""
        found = self.tokenizer.added_tokens_decoder.items()
        return {int(i): t for i, t in found if len(str(t)) > 1 and not str(t).isspace()}

    def mark_for(self, values: Sequence[Any], template: str) -> Mark:
        """Return a mark for the strings in these values, which neither they nor the template hold;
        `NO_MARK` if they spell no added token.
        """
        strings = [text for value in values for text in _strings(value)]
        if not any(self._spelled(text) for text in strings):
            return NO_MARK
        held = "".join([template, *strings])
        for code in _MARKS:
            if chr(code) not in held and _escaped(chr(code)) not in held:
                return Mark(chr(code))
        raise BadRow("it holds all letters for private use")

    def broken(self, value: Any, mark: Mark) -> Any:
        """Return a value (text, list or mapping) with all added tokens in its strings broken."""
        if isinstance(value, str):
            return self._broken(value, mark.letter) if mark.letter else value
        if isinstance(value, Mapping):
            return {self.broken(k, mark): self.broken(part, mark) for k, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.broken(part, mark) for part in value]
        return value

    def ids(self, text: str, mark: Mark) -> list[int]:
        """Encode a text without special tokens around it; its unbroken added tokens are tokens."""
        if not mark.letter or mark.removed(text) == text:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not self.tokenizer.is_fast:
            raise BadRow(
                "a content spells one of the tokenizer's added tokens, which can be written as "
                "text only with a tokenizer of the library tokenizers (tokenizer.json)"
            )
        copy = self._copy_for(text)
        pieces, done = [], 0
        for token, start, stop in self._found(text):
            pieces += [mark.removed(text[done:start]), copy.letters[token]]
            done = stop
        pieces.append(mark.removed(text[done:]))
        found = copy.core.encode("".join(pieces), add_special_tokens=False).ids
        return [copy.ids.get(i, i) for i in found]

    def _found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Find the added tokens in a text: id, start and stop, without the space that they take."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        done = 0
        for token, (first, last) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if token not in self.added:
                continue
            written = str(self.added[token])
            start = text.find(written, first, last)
            if start < 0 and self.added[token].normalized:  # written otherwise, such as in capitals
                written = text[first:last].strip()
                start = text.find(written, first, last)
            # a letter that the model does not know is the unknown token, which nobody wrote
            if start >= done and written:
                done = start + len(written)
                yield token, start, done

    @cached_property
    def _heads(self) -> re.Pattern[str]:
        """Pattern of the first letters of added tokens."""
        letters = {str(token)[0] for token in self.added.values()}
        return re.compile("|".join(map(re.escape, sorted(letters))) or r"(?!)")

    @cached_property
    def _by_length(self) -> tuple[tuple[int, frozenset[str]], ...]:
        texts = [str(token) for token in self.added.values()]
        lengths = sorted({len(text) for text in texts})
        return tuple((n, frozenset(t for t in texts if len(t) == n)) for n in lengths)

    @cached_property
    def _is_normalized(self) -> bool:
        """Whether added tokens are looked for in a text that is changed before (in small letters,
        say), so that other texts than theirs are read as them.
        """
        if not self.tokenizer.is_fast or self.tokenizer.backend_tokenizer.normalizer is None:
            return False
        return any(token.normalized for token in self.added.values())

    def _places(self, text: str) -> Iterator[int]:
        """Places at which an added token begins, also within another."""
        for match in self._heads.finditer(text):
            at = match.start()
            if any(text[at : at + n] in texts for n, texts in self._by_length):
                yield at

    def _spelled(self, text: str) -> bool:
        if next(self._places(text), None) is not None:
            return True
        return bool(self._read_otherwise(text))

    def _broken(self, text: str, letter: str) -> str:
        places = list(self._places(text)) or self._read_otherwise(text)
        while places:
            ends = [*(at + 1 for at in places), len(text)]
            parts = [text[: ends[0]]]
            parts += [text[a:b] for a, b in pairwise(ends)]
            text = letter.join(parts)
            places = self._read_otherwise(text)
        return text

    def _read_otherwise(self, text: str) -> list[int]:
        """Places of added tokens that only the normalized text holds."""
        return [start for _, start, _ in self._found(text)] if self._is_normalized else []

    @cached_property
    def _copies(self) -> dict[int, _Copy]:
        return {}

    def _copy_for(self, text: str) -> _Copy:
        """Return a copy of the tokenizer whose letters are not in the text."""
        count = len(self.added)
        highest = {ord(letter) for letter in text if ord(letter) >= _STAND_INS[0]}
        for base in _STAND_INS:
            if not any(base <= code < base + count for code in highest):
                if base not in self._copies:
                    self._copies[base] = self._copied(base)
                return self._copies[base]
        raise BadRow("it holds letters of both planes for private use, and spells an added token")

    def _copied(self, base: int) -> _Copy:
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        letters = {token: chr(base + place) for place, token in enumerate(self.added)}
        names = {str(self.added[token]): letter for token, letter in letters.items()}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        state["model"] = _renamed(state["model"], names)
        core = Tokenizer.from_str(
            json.dumps({**state, "truncation": None, "padding": None, "post_processor": None})
        )
        known = core.get_vocab()
        ids = {known[letter]: token for token, letter in letters.items()}
        return _Copy(core=core, letters=letters, ids=ids)


def _renamed(model: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a tokenizer's model in which pieces that are added tokens have other names: it would
    find them in a text by itself.
    """
    changed = dict(model)
    if isinstance(model["vocab"], Mapping):
        changed["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:  # Unigram: pieces with their scores
        changed["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") is not None:
        changed["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        changed["merges"] = [
            [first, second]
            for first, second in pairs
            if not {first, second, first + second} & names.keys()
        ]
    return changed


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a text, list or mapping, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _escaped(letter: str) -> str:
    """Write a letter as JSON does that has only ASCII."""
    return f"\\u{ord(letter):04x}"
