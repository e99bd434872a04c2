"""Encoding of conversations as token ids, with the responses marked."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

from spmdrl.data.chat import (
    Chat,
    Talk,
    Tokenizer,
    Tools,
    check_chat_template,
    encoded,
    templates,
    writes_tools,
)
from spmdrl.data.messages import Messages, read_tools
from spmdrl.data.plain_text import Mark
from spmdrl.data.row_problems import BadRow
from spmdrl.data.rows import Row
from spmdrl.data.tool_messages import CALLS
from spmdrl.data.turn_ends import TurnEnds, find_ends

_OTHER_RESPONSE = "fjord-quartz"


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
        chat: writes conversations; None for raw text.
    """

    tokenizer: EndingTokenizer
    chat: Chat | None
    ends: tuple[str, ...]

    @property
    def template(self) -> str | None:
        """Text of the chat templates; None if none is used."""
        return None if self.chat is None else templates(self.tokenizer)

    @property
    def has_tools(self) -> bool:
        """Whether prompts name the tools that a row offers."""
        return self.chat is not None and writes_tools(self.tokenizer)

    def tools_of(self, row: Row) -> Tools:
        """Tools of the row that its prompt names. BadRow: they are malformed."""
        return read_tools(row) if self.has_tools else ()

    @cached_property
    def turn_ends(self) -> TurnEnds:
        assert self.chat is not None
        return find_ends(self.chat, self.ends)

    @property
    def writes_calls(self) -> bool:
        """Whether a response that calls tools and says nothing can be learned from."""
        return self.chat is not None and self.chat.writes_calls

    def encode(self, messages: Messages, tools: Tools = ()) -> tuple[Encoded, ...]:
        """Encode a conversation and mark all its responses; what follows the last one is dropped.

        Where the template writes earlier messages otherwise once another turn is to come (without
        their thinking, say), a new row begins with what the model then sees. Its responses are
        those from there on: each is trained once, after what the model saw before it.

        Raises:
            BadRow: there is no response, nothing precedes the first one, or the chat template does
                not write a response as the continuation of the prompt.
        """
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            raise BadRow("the conversation has no assistant message to learn from")
        if places[0] == 0:
            raise BadRow("the conversation begins with a response: it needs a prompt")
        rows: list[Encoded] = []
        tokens: list[int] = []
        responses: list[tuple[int, int]] = []
        text, ended = "", True
        talk = self._talk(messages, tools)
        for place in places:
            before, response, ends = self._split(talk.first(place + 1))
            if responses and not before.startswith(text):
                rows.append(self._row(tokens, responses, ended=ended))
                tokens, responses, text = [], [], ""
            tokens = self._continued(tokens, text, before, talk.mark)
            start, text, ended = len(tokens), before + response, ends
            tokens = self._continued(tokens, before, text, talk.mark)
            responses.append((start, len(tokens)))
        return (*rows, self._row(tokens, responses, ended=ended))

    def _row(self, tokens: list[int], responses: list[tuple[int, int]], *, ended: bool) -> Encoded:
        """Make a row, whose last response gets an end if the template writes none."""
        if not ended:
            tokens = [*tokens, int(self.tokenizer.eos_token_id)]
            responses = [*responses[:-1], (responses[-1][0], len(tokens))]
        return Encoded(tokens=array("i", tokens), responses=tuple(responses))

    def encode_last(
        self, messages: Messages, tools: Tools = (), *, is_cut: bool = False
    ) -> tuple[array[int], array[int]]:
        """Encode the prompt, as generation does, and the response, which is the last message.

        Args:
            is_cut: whether the response was cut, so that it gets no end.
        """
        talk = self._talk(messages, tools)
        before, response, ended = self._split(talk, is_cut=is_cut)
        prompt = self._ids(before, talk.mark)
        whole = self._continued(prompt, before, before + response, talk.mark)
        end = [] if ended else [int(self.tokenizer.eos_token_id)]
        return array("i", prompt), array("i", whole[len(prompt) :] + end)

    def read_last(self, messages: Messages, tools: Tools, *, is_cut: bool) -> list[int]:
        """Encode prompt and response together. If the template does not write the response as it
        is, take everything that it writes, up to its last special token.
        """
        try:
            prompt, response = self.encode_last(messages, tools, is_cut=is_cut)
        except BadRow:
            if self.chat is None:
                raise
            talk = self._talk(messages, tools)
            text = self.chat.render(talk, prompt=False)
            places = [(text.rfind(end), end) for end in self.ends if end in text]
            if not places:
                end_ids = [] if is_cut else [int(self.tokenizer.eos_token_id)]
                return self._ids(text, talk.mark) + end_ids
            at, end = max(places)
            return self._ids(text[: at if is_cut else at + len(end)], talk.mark)
        return [*prompt, *response]

    def _talk(self, messages: Messages, tools: Tools) -> Talk:
        return Talk(messages=messages) if self.chat is None else self.chat.prepare(messages, tools)

    def _split(self, talk: Talk, *, is_cut: bool = False) -> tuple[str, str, bool]:
        """Split the text into the part before the response (the last message) and the response;
        tell whether it needs no further end: it holds the turn's end, or was cut.
        """
        content = str(talk.messages[-1]["content"])
        if self.chat is None:
            assert len(talk.messages) == 2, talk
            return str(talk.messages[0]["content"]), content, is_cut
        before = self.chat.render(talk.first(len(talk.messages) - 1), prompt=True)
        after = self.chat.render(talk, prompt=False)
        if not after.startswith(before):
            raise BadRow(
                "the chat template does not write the generation prompt before a response that is "
                f"there: {_disagreement(before, after, talk.mark)}; use another template"
            )
        response = after[len(before) :]
        if self.chat.writes_calls and talk.messages[-1].get(CALLS):
            return before, *self._called(response, talk.messages[-1], is_cut=is_cut)
        place = _place(self.chat, before, response, talk)
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

    def _called(
        self, response: str, message: Mapping[str, Any], *, is_cut: bool
    ) -> tuple[str, bool]:
        """Cut a response that calls tools at its end; tell whether it needs no further end. Its
        calls are trained as the template writes them.
        """
        for call in message[CALLS]:
            if call["function"]["name"] not in response:
                raise BadRow(
                    f"the chat template does not write the call of {call['function']['name']!r}: "
                    f"{response[:80]!r}"
                )
        found = self.turn_ends
        for end in (found.calls, found.last, found.history):
            at = -1 if end is None else response.rfind(end)
            if end is not None and at >= 0:
                return response[: at if is_cut else at + len(end)], True
        return response, is_cut

    def _continued(self, tokens: list[int], text: str, longer: str, mark: Mark) -> list[int]:
        """Extend `tokens`, the ids of `text`, to those of `longer`.

        If a token would cross the boundary (a prompt that ends and a response that begins with a
        line break, say), the rest is encoded separately: generation, too, starts from the prompt's
        own tokens.
        """
        if self.chat is not None:
            whole = self._ids(longer, mark)
            if whole[: len(tokens)] == tokens:
                return whole
        elif not tokens:
            return self._ids(longer, mark)
        rest = longer[len(text) :]
        if self.chat is not None:
            return tokens + self.chat.ids(rest, mark)
        return tokens + encoded(self.tokenizer, rest, special=False)

    def _ids(self, text: str, mark: Mark) -> list[int]:
        """Ids of a text; special tokens are added to raw text, since chat templates write them."""
        if self.chat is None:
            return encoded(self.tokenizer, text, special=True)
        return self.chat.ids(text, mark)


def make_encoder(
    source: str,
    tokenizer: EndingTokenizer,
    *,
    chat: bool,
    now: datetime,
    options: Mapping[str, Any] | None = None,
) -> ResponseEncoder:
    """Make an encoder. ValueError: no chat template although `chat`, or no end-of-text token.

    Args:
        options: further variables of the template.
    """
    check_chat_template(source, tokenizer, chat=chat)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data source {source!r}: the tokenizer has no eos_token to end responses")
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = dict.fromkeys([*map(str, tokenizer.all_special_tokens), *added])
    writer = Chat(tokenizer=tokenizer, now=now, options=options or {}) if chat else None
    return ResponseEncoder(tokenizer=tokenizer, chat=writer, ends=tuple(ends))


def _place(chat: Chat, before: str, response: str, talk: Talk) -> int:
    """Index at which the last message's content begins in `response`; -1 if it is not there.

    A short response ("A") may also occur in what the template writes before it ("Assistant:
    A"). If it occurs twice, the place is found by rendering another response in its stead.
    """
    said = str(talk.messages[-1]["content"]).strip()  # some templates strip
    place = response.find(said)
    if place == response.rfind(said):
        return place
    other = [*talk.messages[:-1], {**talk.messages[-1], "content": _OTHER_RESPONSE}]
    text = chat.render(replace(talk, messages=other), prompt=False)
    found = text.find(_OTHER_RESPONSE, len(before)) - len(before)
    return found if found > 0 and response.startswith(said, found) else place


def _disagreement(short: str, long: str, mark: Mark) -> str:
    """Excerpts at the first place where `long` differs from `short`."""
    short, long = mark.removed(short), mark.removed(long)
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(long))
    return f"{short[at : at + 40]!r} becomes {long[at : at + 40]!r}"
