"""Encoding of conversations as token ids, with the responses marked."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from spmdrl.data.load_report import names
from spmdrl.data.messages import BadRow, Messages, checked_text, read_tools
from spmdrl.data.rows import TOOLS, Row, said

Tools = Sequence[Mapping[str, Any]]

_OTHER_RESPONSE = "fjord-quartz"


class Tokenizer(Protocol):
    """The methods used of a `transformers` tokenizer."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> Any: ...

    def __call__(self, text: Any, *, add_special_tokens: bool) -> Any: ...


class EndingTokenizer(Tokenizer, Protocol):
    """A tokenizer that also knows its special tokens, which end the responses given in the data."""

    eos_token_id: Any

    @property
    def all_special_tokens(self) -> Sequence[Any]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Args:
    tokens: int32 ids, up to the end of the last response.
    responses: (start, stop) of each response in `tokens`, its end-of-turn token included.
    """

    tokens: array[int]
    responses: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ResponseEncoder:
    """Finds the tokens of responses in any chat template, by what a longer prefix of the
    conversation adds to a shorter one.

    A response ends with the first special token that the template writes after it. If it writes
    none, or without a template, the last response ends with the end-of-text token.

    Args:
        ends: texts of the special tokens.
        now: the time that the template is given.
    """

    tokenizer: EndingTokenizer
    chat: bool
    ends: tuple[str, ...]
    now: datetime

    @property
    def template(self) -> str | None:
        """Text of the chat templates; None if none is used."""
        return templates(self.tokenizer) if self.chat else None

    @property
    def has_tools(self) -> bool:
        """Whether prompts name the tools that a row offers."""
        return self.chat and writes_tools(self.tokenizer)

    def tools_of(self, row: Row) -> Tools:
        """Tools of the row that its prompt names. BadRow: they are malformed."""
        return read_tools(row) if self.has_tools else ()

    def encode(self, messages: Messages, tools: Tools = ()) -> Encoded:
        """Encode a conversation and mark all its responses; what follows the last one is dropped.

        Raises:
            BadRow: there is no response, nothing precedes the first one, or the chat template
                writes a prefix of the conversation differently from the same part of a longer one.
        """
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            raise BadRow("the conversation has no assistant message to learn from")
        if places[0] == 0:
            raise BadRow("the conversation begins with a response: it needs a prompt")
        tokens: list[int] = []
        responses: list[tuple[int, int]] = []
        text, ended = "", False
        for place in places:
            before, response, ended = self._split(messages[: place + 1], tools)
            if not before.startswith(text):
                raise BadRow(
                    f"the chat template writes messages 0 to {place - 1} otherwise once message "
                    f"{place} is to come: {_disagreement(text, before)}; train on conversations "
                    "with one response, or use another template"
                )
            tokens = self._continued(tokens, text, before)
            start, text = len(tokens), before + response
            tokens = self._continued(tokens, before, text)
            responses.append((start, len(tokens)))
        if not ended:
            tokens = [*tokens, int(self.tokenizer.eos_token_id)]
            responses[-1] = (responses[-1][0], len(tokens))
        return Encoded(tokens=array("i", tokens), responses=tuple(responses))

    def encode_last(
        self, messages: Messages, tools: Tools = (), *, is_cut: bool = False
    ) -> tuple[array[int], array[int]]:
        """Encode the prompt, as generation does, and the response, which is the last message.

        Args:
            is_cut: whether the response was cut, so that it gets no end.
        """
        before, response, ended = self._split(messages, tools, is_cut=is_cut)
        prompt = self._ids(before)
        whole = self._continued(prompt, before, before + response)
        end = [] if ended else [int(self.tokenizer.eos_token_id)]
        return array("i", prompt), array("i", whole[len(prompt) :] + end)

    def read_last(self, messages: Messages, tools: Tools, *, is_cut: bool) -> list[int]:
        """Encode prompt and response together. If the template does not write the response as it
        is, take everything that it writes, up to its last special token.
        """
        try:
            prompt, response = self.encode_last(messages, tools, is_cut=is_cut)
        except BadRow:
            text = render(messages, self.tokenizer, prompt=False, tools=tools, now=self.now)
            places = [(text.rfind(end), end) for end in self.ends if end in text]
            if not places:
                end_ids = [] if is_cut else [int(self.tokenizer.eos_token_id)]
                return self._ids(text) + end_ids
            at, end = max(places)
            return self._ids(text[: at if is_cut else at + len(end)])
        return [*prompt, *response]

    def _split(
        self, messages: Messages, tools: Tools, *, is_cut: bool = False
    ) -> tuple[str, str, bool]:
        """Split the text into the part before the response (the last message) and the response;
        tell whether it needs no further end: it holds the turn's end, or was cut.
        """
        content = str(messages[-1]["content"])
        if not self.chat:
            assert len(messages) == 2, messages
            return str(messages[0]["content"]), content, is_cut
        before = render(messages[:-1], self.tokenizer, prompt=True, tools=tools, now=self.now)
        after = render(messages, self.tokenizer, prompt=False, tools=tools, now=self.now)
        if not after.startswith(before):
            raise BadRow(
                "the chat template does not write the generation prompt before a response that is "
                f"there: {_disagreement(before, after)}; use another template"
            )
        response = after[len(before) :]
        place = self._place(before, response, messages, tools)
        if place < 0:
            raise BadRow(
                f"the chat template does not write the response as it is: {content[:80]!r} becomes "
                f"{response[:80]!r}"
            )
        stop = place + len(content.strip())
        if is_cut:
            return before, response[:stop], True
        found = [(at, end) for end in self.ends if (at := response.find(end, stop)) >= 0]
        if not found:
            return before, response[:stop], False
        at, end = min(found)
        return before, response[: at + len(end)], True

    def _place(self, before: str, response: str, messages: Messages, tools: Tools) -> int:
        """Index at which the last message's content begins in `response`; -1 if it is not there.

        A short response ("A") may also occur in what the template writes before it ("Assistant:
        A"). If it occurs twice, the place is found by rendering another response in its stead.
        """
        said = str(messages[-1]["content"]).strip()  # some templates strip
        place = response.find(said)
        if place == response.rfind(said):
            return place
        other = [*messages[:-1], {**messages[-1], "content": _OTHER_RESPONSE}]
        text = render(other, self.tokenizer, prompt=False, tools=tools, now=self.now)
        found = text.find(_OTHER_RESPONSE, len(before)) - len(before)
        return found if found > 0 and response.startswith(said, found) else place

    def _continued(self, tokens: list[int], text: str, longer: str) -> list[int]:
        """Extend `tokens`, the ids of `text`, to those of `longer`.

        If a token would cross the boundary (a prompt that ends and a response that begins with a
        line break, say), the rest is encoded separately: generation, too, starts from the prompt's
        own tokens.
        """
        if self.chat:
            whole = self._ids(longer)
            if whole[: len(tokens)] == tokens:
                return whole
        elif not tokens:
            return self._ids(longer)
        return tokens + _token_ids(longer[len(text) :], self.tokenizer, special=False)

    def _ids(self, text: str) -> list[int]:
        """Ids of a text; special tokens are added to raw text, since chat templates write them."""
        return _token_ids(text, self.tokenizer, special=not self.chat)


def make_encoder(
    source: str, tokenizer: EndingTokenizer, *, chat: bool, now: datetime
) -> ResponseEncoder:
    """Make an encoder. ValueError: no chat template although `chat`, or no end-of-text token."""
    check_chat_template(source, tokenizer, chat=chat)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data source {source!r}: the tokenizer has no eos_token to end responses")
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = dict.fromkeys([*map(str, tokenizer.all_special_tokens), *added])
    return ResponseEncoder(tokenizer=tokenizer, chat=chat, ends=tuple(ends), now=now)


def check_chat_template(source: str, tokenizer: Tokenizer, *, chat: bool) -> None:
    """Raise ValueError if `chat` needs a chat template and there is none, or no default one."""
    found = tokenizer.chat_template
    if chat and found is None:
        raise ValueError(
            f"data source {source!r}: the tokenizer has no chat template: set chat to false"
        )
    if chat and isinstance(found, Mapping) and "default" not in found:
        raise ValueError(
            f"data source {source!r}: the tokenizer has several chat templates, and none is named "
            f"'default': {', '.join(sorted(found))}"
        )


def templates(tokenizer: Tokenizer) -> str:
    """Text of the tokenizer's chat templates; "" without one."""
    found = tokenizer.chat_template
    named = found if isinstance(found, Mapping) else {"": found or ""}
    return "\n".join(str(named[name]) for name in sorted(named))


def writes_tools(tokenizer: Tokenizer) -> bool:
    """Whether a chat template writes tools."""
    return names(templates(tokenizer), TOOLS)


def tells_time(tokenizer: Tokenizer) -> bool:
    """Whether a chat template writes the date."""
    return "strftime_now" in templates(tokenizer)


def render(
    messages: Messages, tokenizer: Tokenizer, *, prompt: bool, tools: Tools = (), now: datetime
) -> str:
    """Render messages by the chat template, with the beginning of a response (`prompt`) or without.

    Args:
        now: the time of the template's `strftime_now`, fixed so that midnight changes no prompt.

    Raises:
        BadRow: the template refuses the messages or fails on them.
        ValueError: the template has a syntax error.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    more: dict[str, Any] = {"strftime_now": now.strftime}
    if tools:
        more["tools"] = [dict(tool) for tool in tools]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **more
        )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the tokenizer's chat template is none: line {error.lineno}: {error.message}"
        ) from error
    except TemplateError as error:  # such as roles in an order that the template refuses
        raise BadRow(f"the chat template refuses it: {error}") from error
    except Exception as error:  # a template is code: it fails on a row as any code may
        raise BadRow(f"the chat template fails on it: {said(error)}") from error
    return checked_text(str(text), None)


def _token_ids(text: str, tokenizer: Tokenizer, *, special: bool) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # the tokenizer's own, of whatever type
        raise BadRow(f"the tokenizer refuses it: {said(error)}") from error


def _disagreement(short: str, long: str) -> str:
    """Excerpts at the first place where `long` differs from `short`."""
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(long))
    return f"{short[at : at + 40]!r} becomes {long[at : at + 40]!r}"
