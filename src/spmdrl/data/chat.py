"""Chat templates: rendering of messages, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

from spmdrl.data.load_report import names
from spmdrl.data.messages import Messages, checked_text
from spmdrl.data.plain_text import NO_MARK, Mark, PlainText
from spmdrl.data.row_problems import BadRow
from spmdrl.data.rows import TOOLS, said
from spmdrl.data.tool_messages import ASKED, CALLS, SAID, calling, with_json_arguments

Tools = Sequence[Mapping[str, Any]]


class Tokenizer(Protocol):
    """The methods used of a `transformers` tokenizer."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> Any: ...

    def __call__(self, text: Any, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Talk:
    """A conversation that can be rendered.

    Args:
        messages, tools: those given, with the added tokens broken that contents spell.
        mark: what breaks them.
    """

    messages: Messages
    tools: Tools = ()
    mark: Mark = NO_MARK

    def first(self, count: int) -> Talk:
        """The first `count` messages, with the same tools."""
        return Talk(messages=self.messages[:count], tools=self.tools, mark=self.mark)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Writes conversations by a tokenizer's chat template.

    Args:
        now: the time of the template's `strftime_now`, fixed so that midnight changes no prompt.
        options: further variables of the template (`enable_thinking`).
    """

    tokenizer: Tokenizer
    now: datetime
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def plain(self) -> PlainText:
        return PlainText(self.tokenizer)

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the template writes calls of tools."""
        return names(templates(self.tokenizer), CALLS)

    @cached_property
    def takes_json(self) -> bool:
        """Whether the template takes the arguments of calls as JSON texts: it fails on objects, or
        writes them as Python does.
        """
        message = calling([{"name": "tool"}], SAID)
        try:
            text = self.render(Talk(messages=[ASKED, message]), prompt=False)
        except BadRow:
            try:
                self.render(Talk(messages=[ASKED, with_json_arguments(message)]), prompt=False)
            except BadRow:
                return False
            return True
        return f"'{SAID}'" in text

    def prepare(self, messages: Messages, tools: Tools = ()) -> Talk:
        """Make a conversation of messages: what others than the assistant wrote, and the tools,
        yields no added token.
        """
        if any(message.get(CALLS) for message in messages) and self.takes_json:
            messages = [with_json_arguments(message) for message in messages]
        others = [message for message in messages if message["role"] != "assistant"]
        mark = self.plain.mark_for([*others, *tools], templates(self.tokenizer))
        if mark is NO_MARK:
            return Talk(messages=messages, tools=tools)
        broken = [
            message if message["role"] == "assistant" else self.plain.broken(dict(message), mark)
            for message in messages
        ]
        return Talk(
            messages=broken,
            tools=[self.plain.broken(dict(tool), mark) for tool in tools],
            mark=mark,
        )

    def render(self, talk: Talk, *, prompt: bool) -> str:
        """Render with the beginning of a response (`prompt`) or without. Marks stay in the text.

        Raises:
            BadRow: the template refuses the messages or fails on them.
            ValueError: the template has a syntax error.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        more: dict[str, Any] = {"strftime_now": self.now.strftime, **self.options}
        if talk.tools:
            more["tools"] = [dict(tool) for tool in talk.tools]
        try:
            text = self.tokenizer.apply_chat_template(
                list(talk.messages), tokenize=False, add_generation_prompt=prompt, **more
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

    def ids(self, text: str, mark: Mark = NO_MARK) -> list[int]:
        """Encode a rendered text. BadRow: the tokenizer refuses it."""
        return (
            encoded(self.tokenizer, text, special=False)
            if mark is NO_MARK
            else self._ids(text, mark)
        )

    def _ids(self, text: str, mark: Mark) -> list[int]:
        try:
            return self.plain.ids(text, mark)
        except BadRow:
            raise
        except Exception as error:  # the tokenizer's own, of whatever type
            raise BadRow(f"the tokenizer refuses it: {said(error)}") from error


def encoded(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    """Encode a text, with special tokens around it if `special`. BadRow: it is refused."""
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # the tokenizer's own, of whatever type
        raise BadRow(f"the tokenizer refuses it: {said(error)}") from error


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
