"""Reading of a row's columns: a prompt, messages, responses, tools, and a reference answer of any
type as the text that reward functions get. Anything else is a bad row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Protocol

import numpy as np

from spmdrl.data.row_problems import BadRow, shown
from spmdrl.data.rows import TOOLS, Row, is_conversation
from spmdrl.data.tool_messages import CALLS, read_calls

Messages = Sequence[Mapping[str, Any]]

_ROLES = ("system", "user", "assistant", "tool")


class PromptSettings(Protocol):
    """Settings by which prompts are read, the same for all kinds of data."""

    @property
    def prompt_column(self) -> str: ...

    @property
    def template(self) -> str: ...

    @property
    def system(self) -> str | None: ...

    @property
    def chat(self) -> bool: ...


def checked_text(text: str, column: str | None) -> str:
    """Return the text of a column (None: of the chat template). BadRow: it has half of a surrogate
    pair, which no encoding can write.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        letter = text[error.start]
        where = "the rendered conversation" if column is None else f"column {column!r}"
        raise BadRow(
            f"{where}: {letter!r} at letter {error.start} is half of a character"
        ) from error
    return text


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Args:
    text: the first user message, before any template.
    messages: the conversation up to the responses; one message for raw text.
    responses: text of one response for each column asked for.
    answers: their messages.
    """

    text: str
    messages: Messages
    responses: tuple[str, ...]
    answers: Messages


def read_responses(row: Row, columns: Sequence[str], settings: PromptSettings) -> Asked:
    """Read a row's prompt, and the responses in some columns.

    A response is a text, or the last message of a conversation. The messages before it are then the
    prompt, the same in all columns, and the prompt's own column may be missing.

    Raises:
        BadRow: a response or the prompt is missing, or columns disagree about the prompt.
    """
    answers: list[Mapping[str, Any]] = []
    contexts: list[Messages] = []
    for column in columns:
        value = row.get(column)
        if isinstance(value, str) and column == settings.prompt_column:
            raise BadRow(same_column(column))
        if isinstance(value, str):
            _refuse_json(value, column)
            answers.append({"role": "assistant", "content": checked_text(value, column)})
            continue
        if not isinstance(value, list):
            raise BadRow(f"column {column!r} holds no text and no conversation but {shown(value)}")
        context, answer = ending_in_response(value, column, settings)
        answers.append(answer)
        contexts += [context] if context else []
    responses = tuple(str(answer["content"]) for answer in answers)
    column = settings.prompt_column
    given = row.get(column)
    if not contexts:
        if not row.has(column):
            raise BadRow(f"there is no column {column!r} for the prompt in {sorted(row.values)}")
        prompt = read_prompt(given, column, settings)
        text = given if isinstance(given, str) else opening(prompt)
        return Asked(text=text, messages=prompt, responses=responses, answers=answers)
    first = contexts[0]
    if any(prompt_key(context) != prompt_key(first) for context in contexts):
        raise BadRow("the conversations differ before their last response")
    waiting(first, columns[0])
    if column not in columns and given is not None:
        messages = _with_given(first, given, settings)
    else:
        messages = with_system(first, settings)
    return Asked(text=opening(first), messages=messages, responses=responses, answers=answers)


def _with_given(context: Messages, given: Any, settings: PromptSettings) -> Messages:
    """Messages before the responses, checked against the prompt's column. If that holds a text
    which is the only user message, the template is applied to it.
    """
    column = settings.prompt_column
    if not isinstance(given, str):
        if prompt_key(checked_messages(given, column, settings)) != prompt_key(context):
            raise BadRow(f"column {column!r} is not what precedes the responses")
        return with_system(context, settings)
    users = [m["content"] for m in context if m["role"] == "user"]
    if given not in users:
        raise BadRow(
            f"column {column!r} is no message of the user before the responses, but "
            f"{shown(given)}: where they are whole conversations, prompt_column can be their column"
        )
    if len(users) > 1:
        return with_system(context, settings)
    asked = {"role": "user", "content": settings.template.replace("{prompt}", given)}
    return with_system([asked if m["role"] == "user" else m for m in context], settings)


def read_prompt(value: Any, column: str, settings: PromptSettings) -> list[Mapping[str, Any]]:
    """Read the conversation that a prompt's column holds (a text becomes one user message).

    Raises:
        BadRow: it is neither a text nor messages that wait for a response.
    """
    if isinstance(value, list):
        return with_system(waiting(checked_messages(value, column, settings), column), settings)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"column {column!r} holds no text but {shown(value)}")
    checked_text(value, column)
    _refuse_json(value, column)
    # not str.format: prompts and templates are full of braces
    text = settings.template.replace("{prompt}", value)
    return with_system([{"role": "user", "content": text}], settings)


def same_column(column: str) -> str:
    """Message for a text named as prompt and as answer (a conversation may be: it holds both)."""
    return f"column {column!r} is named as prompt and as answer, and holds one text"


def _refuse_json(text: str, column: str) -> None:
    """Raise BadRow for a conversation stored as text: the model would be prompted with its JSON."""
    if not (text.lstrip().startswith("[") and '"role"' in text):
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    if is_conversation(value):
        raise BadRow(f"column {column!r} holds a conversation as text: store it as a list")


def checked_messages(value: Any, column: str, settings: PromptSettings) -> list[Mapping[str, Any]]:
    """Return a column's list of `{role, content}` without keys that hold null, since chat templates
    ask whether a key exists. BadRow for anything else.
    """
    messages: list[Mapping[str, Any]] = []
    for message in value if isinstance(value, list) else []:
        given = message if isinstance(message, Mapping) else {}
        if given.get(CALLS) and given.get("role") == "assistant":
            calls = read_calls(given[CALLS], column)
            given = {**given, "content": given.get("content") or "", CALLS: calls}
        if not isinstance(given.get("role"), str) or not isinstance(given.get("content"), str):
            raise BadRow(f"column {column!r}: {shown(message)} is no message with role and content")
        _check_role(given["role"], column)
        checked_text(given["content"], column)
        messages.append({key: part for key, part in given.items() if part is not None})
    if not messages:
        raise BadRow(f"column {column!r} holds no conversation but {shown(value)}")
    if not settings.chat:
        raise BadRow(f"column {column!r} holds messages, which need chat=True")
    return messages


def _check_role(role: str, column: str) -> None:
    checked_text(role, column)
    meant = role.strip().lower()
    if meant != role and meant in _ROLES:
        raise BadRow(f"column {column!r}: the role {role!r} must be written {meant!r}")
    if not meant:
        raise BadRow(f"column {column!r}: a message has the role {role!r}, which is none")


def waiting(messages: Messages, column: str) -> list[Mapping[str, Any]]:
    """Return the messages; BadRow unless they wait for a response to a user."""
    if not any(m["role"] == "user" for m in messages) or messages[-1]["role"] == "assistant":
        raise BadRow(
            f"column {column!r} holds no conversation that waits for a response: "
            f"{shown(list(messages))}"
        )
    return list(messages)


def ending_in_response(
    value: Any, column: str, settings: PromptSettings
) -> tuple[Messages, Mapping[str, Any]]:
    """Split a conversation into the messages before its last response, and that response.

    Raises:
        BadRow: it does not end with a response.
    """
    messages = checked_messages(value, column, settings)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"column {column!r} does not end with an assistant message")
    return messages[:-1], messages[-1]


def with_system(messages: Messages, settings: PromptSettings) -> list[Mapping[str, Any]]:
    """Put the settings' system prompt in front, unless the messages have their own."""
    if settings.system is not None and messages[0]["role"] != "system":
        return [{"role": "system", "content": settings.system}, *messages]
    return list(messages)


def opening(messages: Messages) -> str:
    """First user message: it is the same in all turns and continuations of a conversation."""
    return str(next((m for m in messages if m["role"] == "user"), messages[0])["content"])


def prompt_key(messages: Messages) -> Hashable:
    """Key that is equal for equal prompts."""
    return tuple((m["role"], m["content"], *_calls_key(m)) for m in messages)


def _calls_key(message: Mapping[str, Any]) -> tuple[str, ...]:
    return (json.dumps(message[CALLS], default=str),) if message.get(CALLS) else ()


def read_tools(row: Row) -> Sequence[Mapping[str, Any]]:
    """Read the tools that the row's prompt offers from the column `tools`: a list, or its JSON.
    BadRow for anything else.
    """
    value = row.values.get(TOOLS)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"column {TOOLS!r} holds no list of tools: {error}") from error
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"column {TOOLS!r} holds no list of tools but {shown(value)}")
    return value


def answer_text(value: Any, column: str, pattern: str | None) -> str:
    """Text of the answer that a column holds.

    Numbers are written as in JSON (decimals with all their digits), dates as ISO 8601, lists as
    JSON.

    Args:
        pattern: regular expression whose group 1 (or whole match) is the answer; None: all of it.

    Raises:
        BadRow: the value is missing (null, NaN, pandas' missing values), a struct (one of its
            fields may be the answer), bytes or infinite; or the pattern is not found.
    """
    text = _text(value, column)
    checked_text(text, column)
    if pattern is None:
        return text
    match = re.search(pattern, text)
    if match is None:
        raise BadRow(f"the answer {text[-80:]!r} does not match {pattern!r}")
    found = match.group(1) if match.re.groups else match.group()
    if found is None:
        raise BadRow(f"the answer {text[-80:]!r} has no group 1 of {pattern!r}")
    return str(found).strip()


def _text(value: Any, column: str) -> str:
    value = _plain(value, column)
    if value is None:
        raise BadRow(f"column {column!r} holds no answer")
    if isinstance(value, Mapping):
        fields = ", ".join(f"{column}.{name}" for name in value)
        raise BadRow(f"column {column!r} holds no answer but fields: name one of {fields}")
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        return f"{value:f}"
    try:
        return json.dumps(value, default=str)
    except (ValueError, RecursionError) as error:
        raise BadRow(
            f"column {column!r} holds an answer that cannot be written: {error}"
        ) from error


def _plain(value: Any, column: str) -> Any:
    """Convert a value from libraries' types to plain ones; None if it means a missing value.

    Raises:
        BadRow: the value is bytes or an infinite number.
    """
    if isinstance(value, np.datetime64 | np.timedelta64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        if value.is_nan() if isinstance(value, Decimal) else math.isnan(value):
            return None
        if not math.isfinite(value):
            raise BadRow(f"column {column!r} holds no answer but {value}")
        return value
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return [_number(_plain(item, column)) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        raise BadRow(f"column {column!r} holds bytes, no answer: store it as text")
    # pandas' NaT and NA are equal to nothing, not even to themselves
    if str(value) in ("NaT", "<NA>"):
        return None
    return value.isoformat() if isinstance(value, date | datetime | time) else str(value)


def _number(value: Any) -> Any:
    """Convert a decimal in a list to a number that JSON can write."""
    if not isinstance(value, Decimal):
        return value
    return int(value) if value == value.to_integral_value() else float(value)
