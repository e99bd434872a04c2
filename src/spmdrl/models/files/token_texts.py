"""A tokenizer's data about single tokens: texts, special tokens, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class End:
    """A token that ends a text.

    Args:
        source: the origin of this fact, in words.
    """

    token: int
    text: str
    source: str


@dataclass(frozen=True, kw_only=True)
class TokenTexts:
    """Texts of tokens, without the tokenizer.

    Args:
        decode: function from token ids to text without special tokens.
        decode_all: function from token ids to text that includes special tokens.
        special: ids of the special tokens by their texts.
        ends: tokens that end a text according to the tokenizer.
    """

    decode: Decode
    decode_all: Decode
    special: Mapping[str, int] = field(default_factory=dict)
    ends: tuple[End, ...] = ()


def token_texts(tokenizer: Any, *, chat: bool) -> TokenTexts:
    """Make the texts of a transformers tokenizer.

    Args:
        chat: whether the chat template is used; its end of an assistant's message is then an end.
    """

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def decode_all(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        return text

    return TokenTexts(
        decode=decode,
        decode_all=decode_all,
        special=special_tokens(tokenizer),
        ends=tokenizer_ends(tokenizer, chat=chat),
    )


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the tokens that a decoded text can leave out, by their texts."""
    added = tokenizer.added_tokens_decoder.items()
    found = {str(token): int(i) for i, token in added if token.special}
    named = [str(token) for token in tokenizer.all_special_tokens]
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in named} | found


def tokenizer_ends(tokenizer: Any, *, chat: bool) -> tuple[End, ...]:
    """List the tokens with which responses in training data end: the end of text, and the chat
    template's end of an assistant's message if that is another token.
    """
    found = []
    if tokenizer.eos_token_id is not None:
        found.append(
            End(
                token=int(tokenizer.eos_token_id),
                text=str(tokenizer.eos_token),
                source="the tokenizer's eos_token",
            )
        )
    written = turn_end(tokenizer) if chat else None
    if written is not None and written.token not in [end.token for end in found]:
        found.append(written)
    return tuple(found)


def turn_end(tokenizer: Any) -> End | None:
    """Find the special token that the chat template writes first after an assistant's message;
    None if there is no template, or it writes none.
    """
    if tokenizer.chat_template is None:
        return None
    response = "fjord-quartz"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": response}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:
        # A template is a program, and may raise anything for a conversation it does not expect.
        # Here only its end is of interest; rows that it refuses are named when they are read.
        return None
    place = text.rfind(response)
    if place < 0:
        return None
    rest = text[place + len(response) :]
    special = special_tokens(tokenizer)
    found = [(at, -len(token), token) for token in special if (at := rest.find(token)) >= 0]
    if not found:
        return None
    token = min(found)[2]
    return End(token=special[token], text=token, source="the chat template's end of a turn")
