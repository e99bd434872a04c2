"""Rows with tools: calls are trained as the template writes them, results are not trained on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_cases import marked, write_rows

from chat_templates import FAMILIES, Family, byte_tokenizer
from data_sources import data_source
from spmdrl.data.conversations import load_conversations
from spmdrl.data.preferences import load_preferences
from spmdrl.data.prompts import load_prompts

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
WHOLE = {"columns": {"messages": "messages"}}


def conversation(arguments: Any, *, flat: bool = False, **more: Any) -> list[dict[str, Any]]:
    call = {"name": "add", "arguments": arguments}
    calls: Any = [call if flat else {"type": "function", "id": "call12345", "function": call}]
    return [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "tool_calls": calls, **more},
        {"role": "tool", "name": "add", "content": "4", "tool_call_id": "call12345"},
        {"role": "assistant", "content": "four"},
    ]


def loaded(tmp_path: Path, family: Family, *rows: Any, **settings: Any) -> list[str]:
    tokenizer = byte_tokenizer(family)
    source = data_source(source=write_rows(tmp_path, *rows), **WHOLE, **settings)
    items = load_conversations(source, tokenizer)
    return [
        marked(tokenizer, i.tokens, i.loss_mask).replace("Ġ", " ").replace("Ċ", "\n") for i in items
    ]


HERMES = (
    '<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{<tool_call>\n{"name": "add", '
    '"arguments": {"a": 2}}\n</tool_call><|im_end|>}\n<|im_start|>user\n<tool_response>\n4\n'
    "</tool_response><|im_end|>\n<|im_start|>assistant\n{four<|im_end|>}"
)


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}', '{"a":2}'])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("more", [{}, {"content": ""}, {"content": None}])
def test_a_call_is_trained(tmp_path: Path, arguments: Any, flat: bool, more: Any) -> None:
    row = {"messages": conversation(arguments, flat=flat, **more)}
    assert loaded(tmp_path, FAMILIES["hermes"], row) == [HERMES]


def test_the_tools_of_the_row_and_a_content_before_the_call(tmp_path: Path) -> None:
    row = {"messages": conversation({"a": 2}, content="I add."), "tools": json.dumps(TOOLS)}
    (text,) = loaded(tmp_path, FAMILIES["hermes"], row)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "add"')
    assert '{I add.\n<tool_call>\n{"name": "add"' in text


def test_calls_in_other_templates(tmp_path: Path) -> None:
    row = {"messages": conversation('{"a": 2}')}
    (headers,) = loaded(tmp_path, FAMILIES["headers"], row)
    assert '{{"name": "add", "parameters": {"a": 2}}<|eot|>}' in headers
    assert headers.endswith("{four<|eot|>}")
    (brackets,) = loaded(tmp_path, FAMILIES["brackets"], row)
    assert '{[CALLS][{"name": "add", "arguments": {"a": 2}}]</s>}[RESULTS]{"cont' in brackets
    # the end of a turn is another one in the history, so each turn has its own row
    call = '{ to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>}'
    (channels,) = loaded(tmp_path, FAMILIES["channels"], row)
    assert call in channels and channels.endswith("{<|channel|>final<|message|>four<|return|>}")


def test_each_turn_has_what_the_model_saw_before_it(tmp_path: Path) -> None:
    """A row for each answer whose end the history writes otherwise."""
    messages = [*conversation({"a": 2}), {"role": "user", "content": "5?"}]
    messages.append({"role": "assistant", "content": "five"})
    first, second = loaded(tmp_path, FAMILIES["channels"], {"messages": messages})
    assert first.count("{") - first.count('{"a') == 2 and first.endswith("four<|return|>}")
    assert "four<|end|>" in second and second.count("}") - second.count("2}") == 1
    assert second.endswith("{<|channel|>final<|message|>five<|return|>}")


CONCATENATING = FAMILIES["hermes"].template.replace(
    "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    "'' + c.function.arguments",
)
SHOWING = CONCATENATING.replace("'' + c.f", "c.f")


@pytest.mark.parametrize("template", [CONCATENATING, SHOWING])
@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
def test_templates_that_take_the_arguments_as_text(
    tmp_path: Path, template: str, arguments: Any
) -> None:
    family = Family(
        template=template, special=FAMILIES["hermes"].special, words=FAMILIES["hermes"].words
    )
    assert loaded(tmp_path, family, {"messages": conversation(arguments)}) == [HERMES]


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ("add", "tool_calls is no list of calls but 'add'"),
        ([4], r"tool_calls is no list of calls but \[4\]"),
        ([{"name": "add", "arguments": "{"}], "arguments that are an object or its JSON"),
        ([{"function": {"arguments": {}}}], "a call of a tool has a name"),
    ],
)
def test_malformed_calls(tmp_path: Path, calls: Any, problem: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": calls}]
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{problem}"):
        loaded(tmp_path, FAMILIES["hermes"], {"messages": messages})


def test_a_template_without_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": conversation({"a": 2})}, {"messages": conversation({}, content="b")}]
    (text,) = loaded(tmp_path, FAMILIES["chatml"], *rows)
    assert "{b<|im_end|>}" in text
    assert "1 with a response that only calls tools, which the chat template does" in caplog.text
    assert "have the key 'tool_calls', which the chat template does not read" in caplog.text


def test_pairs_that_end_in_calls(tmp_path: Path) -> None:
    chosen, rejected = conversation({"a": 2})[:2], conversation({"a": 3})[:2]
    tokenizer = byte_tokenizer(FAMILIES["hermes"])
    file = write_rows(tmp_path, {"chosen": chosen, "rejected": rejected})
    (pair,) = load_preferences(data_source(source=file), tokenizer)
    texts = [tokenizer.decode(part) for part in (pair.chosen, pair.rejected)]
    assert ['"a": 2' in text for text in texts] == [True, False]
    assert all(text.endswith("</tool_call><|im_end|>") for text in texts)


def test_variables_of_the_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(FAMILIES["thinking"])
    file = write_rows(tmp_path, {"prompt": "a", "response": "b"})
    source = data_source(
        source=file, chat_template_kwargs={"enable_thinking": False, "colour": "red"}
    )
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(source, tokenizer)
        (item,) = load_conversations(source, tokenizer)
    head = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(prompt.tokens).endswith(head)
    assert tuple(item.tokens[: item.responses[0][0]]) == prompt.tokens
    assert prompt.options == source.chat_template_kwargs
    told = "data.train.chat_template_kwargs.colour has no effect: the chat template does not know"
    assert sum(told in line for line in caplog.messages) == 2
    assert "enable_thinking has" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"chat_template_kwargs": {"tools": []}}, "tools is given to the chat template by the run"),
        ({"chat_template_kwargs": {"a": 1}, "chat": False}, "raw text has no chat template"),
    ],
)
def test_variables_that_cannot_be(settings: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        data_source(source="a.jsonl", **settings)


def test_a_date_of_the_users_own(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(FAMILIES["headers"])
    file = write_rows(tmp_path, {"prompt": "a"})
    source = data_source(source=file, chat_template_kwargs={"date_string": "1 May 2020"})
    assert "1 May 2020<|eot|>" in tokenizer.decode(load_prompts(source, tokenizer)[0].tokens)
