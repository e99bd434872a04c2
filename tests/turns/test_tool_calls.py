"""Calls of tools as models of four families write them."""

from __future__ import annotations

from typing import Any

import pytest

from spmdrl.turns.tool_calls import PARSERS, ToolCall, format_of

ADD = {"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}
NOW = {"name": "now", "arguments": {}}

CASES: dict[str, tuple[str, str, list[dict[str, Any]], str]] = {
    "hermes": (
        "hermes",
        'First.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}\n</tool_call>\n'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>',
        [ADD, NOW],
        "First.\n\n<|im_end|>",
    ),
    "hermes, cut after the call": (
        "hermes",
        '<tool_call>\n{"name": "now", "arguments": "{}"}',
        [NOW],
        "",
    ),
    "qwen's tags": (
        "hermes",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
        '[2, "x"]\n</parameter>\n</function>\n</tool_call>',
        [ADD],
        "",
    ),
    "a parameter that is a text": (
        "hermes",
        "<tool_call><function=say><parameter=text>two\nlines</parameter></function></tool_call>",
        [{"name": "say", "arguments": {"text": "two\nlines"}}],
        "",
    ),
    "llama 3": (
        "llama3",
        '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": [2, "x"]}}; '
        '{"name": "now", "parameters": {}}<|eom_id|>',
        [ADD, NOW],
        "",
    ),
    "llama 3, no call": ("llama3", "It is {3}.<|eot_id|>", [], "It is {3}."),
    "mistral": (
        "mistral",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}, '
        '{"name": "now", "arguments": {}, "id": "123456789"}]</s>',
        [ADD, NOW],
        "",
    ),
    "mistral by name": (
        "mistral",
        'Well.[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2, "x"]}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}</s>',
        [ADD, NOW],
        "Well.",
    ),
    "gpt-oss": (
        "harmony",
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.add <|constrain|>json<|message|>{"a": 1, "b": [2, "x"]}<|call|>',
        [ADD],
        "",
    ),
    "gpt-oss, the address first": (
        "harmony",
        "to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        [NOW],
        "",
    ),
    "gpt-oss, no call": (
        "harmony",
        "<|channel|>analysis<|message|>2.<|end|><|start|>assistant<|channel|>final<|message|>"
        "It is 2.<|return|>",
        [],
        "It is 2.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_calls_are_read_as_their_family_writes_them(case: str) -> None:
    name, text, calls, rest = CASES[case]
    found = PARSERS[name](text)
    assert found.problem is None
    assert list(found.calls) == [ToolCall(**call) for call in calls]
    assert found.text == rest


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("hermes", "<tool_call>{'name': 'add'}</tool_call>", "no JSON"),
        ("hermes", "<tool_call>[1]</tool_call>", 'object with "name" and "arguments"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "'f' must be"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "no JSON"),
        ("llama3", '{"name": "f", "parameters": {}', "no JSON"),
        ("llama3", '{"name": 3, "parameters": {}}', 'object with "name" and "parameters"'),
        ("mistral", "[TOOL_CALLS]f[ARGS]{", "no JSON"),
        ("harmony", "<|channel|>commentary to=functions.f<|message|>{<|call|>", "no JSON"),
    ],
)
def test_a_call_that_cannot_be_read_is_a_problem_in_words(
    name: str, text: str, problem: str
) -> None:
    found = PARSERS[name](text)
    assert found.calls == () and found.problem is not None and problem in found.problem


def test_a_template_shows_its_format() -> None:
    assert format_of("{{ '<tool_call>' }}") == "hermes"
    assert format_of('{"name": x, "parameters": y}') == "llama3"
    assert format_of("[AVAILABLE_TOOLS] ... [TOOL_CALLS]") == "mistral"
    assert format_of("<|start|>assistant<|channel|>final") == "harmony"
    assert format_of("{{ messages }}") is None
