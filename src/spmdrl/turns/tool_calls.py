"""Calls of tools in a model's text, by the format of its template's family.

A parser is a function from a turn's text, with its special tokens, to `ToolCalls`. What a model
writes is data: a call that cannot be read is a problem to be told to the model, never an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call.

    Args:
        arguments: values by the names of the function's parameters.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ToolCalls:
    """Calls of a turn.

    Args:
        text: the text without them, stripped.
        problem: what is wrong with a call that cannot be read, in words for the model; there are no
            calls then.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    problem: str | None = None


Parser = Callable[[str], ToolCalls]


class _Unreadable(ValueError):
    """A call that cannot be read; its text is for the model."""


def _parser(pattern: str, read: Callable[[re.Match[str]], Iterator[ToolCall]]) -> Parser:
    """Return a parser of the calls in all matches of a pattern."""
    compiled = re.compile(pattern, re.DOTALL)

    def parse(text: str) -> ToolCalls:
        rest = compiled.sub("", text).strip()
        try:
            calls = [call for match in compiled.finditer(text) for call in read(match)]
        except _Unreadable as error:
            return ToolCalls(text=rest, problem=str(error))
        return ToolCalls(text=rest, calls=tuple(calls))

    return parse


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"the tool call is no JSON: {error}") from None


def _call(value: Any, key: str = "arguments") -> ToolCall:
    """Read `{"name": ..., "arguments": {...}}`; some models write the arguments as a JSON text."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _Unreadable('a tool call is a JSON object with "name" and "' + key + '"')
    arguments = value.get(key, {})
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        raise _Unreadable(f'"{key}" of the tool call {value["name"]!r} must be a JSON object')
    return ToolCall(name=value["name"], arguments=arguments)


# Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or as tags


def _tagged(match: re.Match[str]) -> Iterator[ToolCall]:
    inside = match[1].strip()
    function = re.fullmatch(r"<function=([^>\s]+)>(.*?)(?:</function>)?", inside, re.DOTALL)
    if function is None:
        yield _call(_json(inside))
        return
    pattern = r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>"
    found = re.findall(pattern, function[2], re.DOTALL)
    yield ToolCall(name=function[1], arguments={name: _plain(text) for name, text in found})


def _plain(text: str) -> Any:
    """Read a value that is written without quotes: as JSON if it is, or else as a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


hermes = _parser(r"<tool_call>(.*?)(?:</tool_call>|\Z)", _tagged)


# Llama 3: the turn is {"name": ..., "parameters": {...}}, or several with semicolons between them


def llama3(text: str) -> ToolCalls:
    """Read calls of Llama 3.1 and later; a turn that is no JSON has none."""
    body = re.sub(r"<\|(?:eom_id|eot_id|python_tag)\|>", "", text).strip()
    if not body.startswith("{"):
        return ToolCalls(text=body)
    decoder, at, calls = json.JSONDecoder(), 0, []
    try:
        while at < len(body):
            value, at = decoder.raw_decode(body, at)
            key = "parameters" if isinstance(value, dict) and "parameters" in value else "arguments"
            calls.append(_call(value, key))
            at = re.compile(r"[\s;]*").match(body, at).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError) as error:
        words = str(error) if isinstance(error, _Unreadable) else f"no JSON: {error}"
        return ToolCalls(text="", problem=words)
    return ToolCalls(text="", calls=tuple(calls))


# Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...} for each


def _mistral(match: re.Match[str]) -> Iterator[ToolCall]:
    inside = re.sub(r"</s>\s*\Z", "", match[1]).strip()
    named = re.match(r"([^\s\[{]+?)(?:\[CALL_ID\][^\[]*)?\[ARGS\](.*)", inside, re.DOTALL)
    if named is not None:
        yield _call({"name": named[1], "arguments": _json(named[2])})
        return
    found = _json(inside)
    for value in found if isinstance(found, list) else [found]:
        yield _call(value)


mistral = _parser(r"\[TOOL_CALLS\](.*?)(?=\[TOOL_CALLS\]|\Z)", _mistral)


# gpt-oss (harmony): a message on the channel commentary that is addressed to functions.NAME


def _harmony(match: re.Match[str]) -> Iterator[ToolCall]:
    to = re.search(r"to=(?:functions\.)?([\w.-]+)", match[1])
    if to is None:
        return
    yield _call({"name": to[1], "arguments": _json(match[2].strip() or "{}")})


def harmony(text: str) -> ToolCalls:
    """Read calls of gpt-oss; the text is that of the channel `final`."""
    found = _harmony_calls(text)
    final = re.findall(r"<\|channel\|>final[^<]*<\|message\|>(.*?)(?:<\||\Z)", text, re.DOTALL)
    return ToolCalls(text="".join(final).strip(), calls=found.calls, problem=found.problem)


_harmony_calls = _parser(
    r"((?:to=[\w.-]+\s*)?<\|channel\|>(?:commentary|analysis)[^<]*(?:<\|constrain\|>[^<]*)?)"
    r"<\|message\|>(.*?)(?:<\|call\|>|<\|end\|>|<\|return\|>|<\|start\|>|\Z)",
    _harmony,
)

PARSERS: Mapping[str, Parser] = MappingProxyType(
    {"hermes": hermes, "llama3": llama3, "mistral": mistral, "harmony": harmony}
)
"""Name of a format -> its parser."""

_MARKS = (
    ("harmony", "<|channel|>"),
    ("mistral", "[TOOL_CALLS]"),
    ("hermes", "<tool_call>"),
    ("llama3", '"parameters"'),
    ("llama3", "<|python_tag|>"),
)
"""Format -> a text by which a chat template shows it, in the order of the search."""


def format_of(template: str) -> str | None:
    """Return the format of the calls that a chat template writes; None if it shows none of them."""
    return next((name for name, mark in _MARKS if mark in template), None)
