"""Rows that are easily taken for others: keys that stand twice, roles, places of short answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_cases import CHATML, character_tokenizer, turns, write_rows
from pyarrow import parquet

from data_sources import data_source
from spmdrl.data.conversations import load_conversations
from spmdrl.data.prompts import load_prompts
from spmdrl.data.rows import read_rows

NAMED = (  # no generation prompt, and no end of a turn
    "{% for m in messages %}{{ m['role']|capitalize }}: {{ m['content'] }}\n{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n"
    "{% endif %}{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


def answer_of(tmp_path: Path, template: str, said: str) -> str:
    file = write_rows(tmp_path, {"messages": turns("q", said)})
    source = data_source(source=str(file), columns={"messages": "messages"})
    tokenizer = character_tokenizer(template)
    (item,) = load_conversations(source, tokenizer)
    ((start, stop),) = item.responses
    return "".join(tokenizer.convert_ids_to_tokens(list(item.tokens[start:stop])))


@pytest.mark.parametrize("said", ["A", "s", "sis", "Assistant", ":", "hello", "t: t"])
def test_a_short_answer_is_not_looked_for_in_what_the_template_writes_before_it(
    tmp_path: Path, said: str
) -> None:
    assert answer_of(tmp_path, NAMED, said) == f"Assistant: {said}<|im_end|>"
    assert answer_of(tmp_path, CHATML, said) == f"{said}<|im_end|>"


@pytest.mark.parametrize("said", ["t", "think", ">", "hello"])
def test_nor_in_an_empty_thought(tmp_path: Path, said: str) -> None:
    assert answer_of(tmp_path, THINKING, said) == f"<think>\n\n</think>\n{said}<|im_end|>"


def prompts(tmp_path: Path, *rows: Any, template: Any = CHATML, **settings: Any) -> Any:
    file = write_rows(tmp_path, *rows)
    return load_prompts(data_source(source=str(file), **settings), character_tokenizer(template))


TEXT = '[{"role": "user", "content": "x"}]'


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ('{"prompt": "a", "prompt": "b"}', {}, "the key 'prompt' stands twice"),
        ('{"prompt": "a", "x": {"y": 1, "y": 2}}', {}, "the key 'y' stands twice"),
        ({"prompt": TEXT}, {}, "column 'prompt' holds a conversation as text: store it as a list"),
        (
            {"prompt": [{"role": "User", "content": "x"}]},
            {},
            "the role 'User' must be written 'user'",
        ),
        ({"prompt": [*turns("a", "b", "c"), {"role": " ", "content": ""}]}, {}, "has the role ' '"),
        ({"prompt": "a"}, {"answer_column": "prompt"}, "is named as prompt and as answer"),
        ({"prompt": "a"}, {}, "the chat template writes nothing for it"),
    ],
)
def test_what_is_easily_taken_for_something_else_is_a_bad_row(
    tmp_path: Path, row: Any, settings: Any, message: str
) -> None:
    template = "" if "nothing" in message else CHATML
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{message}"):
        prompts(tmp_path, row, template=template, **settings)


@pytest.mark.parametrize("row", [{"prompt": "a", "response": TEXT}, {"prompt": "a"}])
def test_so_it_is_as_an_answer(tmp_path: Path, row: dict[str, str]) -> None:
    column = "response" if "response" in row else "prompt"
    source = data_source(source=write_rows(tmp_path, row), columns={"response": column})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: column .* (as text|holds one text)"):
        load_conversations(source, character_tokenizer())


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "two.parquet"
    columns = [pa.array(["a"]), pa.array(["b"])]
    parquet.write_table(pa.Table.from_arrays(columns, names=["prompt", "prompt"]), file)
    with pytest.raises(ValueError, match=r"two\.parquet.*two columns are named 'prompt'"):
        list(read_rows(str(file), parameters={}, size=None, seed=0))


def test_narrow_numbers_are_those_that_were_written(tmp_path: Path) -> None:
    """A float32 of 0.1 was the answer 0.10000000149011612, and a small decimal had an exponent."""
    file = tmp_path / "narrow.parquet"
    half = pa.array([0.1, None], pa.float32()).cast(pa.float16())
    inner = pa.StructArray.from_arrays([pa.array([0.3, 2.0], pa.float32())], ["truth"])
    table = {
        "prompt": ["a", "b"],
        "single": pa.array([0.1, -2.5e-7], pa.float32()),
        "half": half,
        "extra": inner,
        "double": [0.10000000149011612, 1234567.875],
    }
    parquet.write_table(pa.table(table), file)
    first, second = [r.values for r in read_rows(str(file), parameters={}, size=None, seed=0)]
    assert (first["single"], first["half"], first["extra"]) == (0.1, 0.1, {"truth": 0.3})
    assert (second["single"], second["half"]) == (-2.5e-7, None)
    assert (first["double"], second["double"]) == (0.10000000149011612, 1234567.875)


def test_keys_of_messages_without_effect_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{**m, "weight": 0} for m in turns("q", "a")]
    file = write_rows(tmp_path, {"messages": messages}, {"messages": messages})
    source = data_source(source=str(file), columns={"messages": "messages"})
    with caplog.at_level(logging.WARNING):
        load_conversations(source, character_tokenizer())
        told = "4 messages have the key 'weight', which the chat template does not read"
        assert [told in line for line in caplog.messages] == [True]
        caplog.clear()
        weighed = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.weight or '' }}")
        load_conversations(source, character_tokenizer(weighed))
        assert caplog.messages == []


def test_a_template_that_does_not_write_the_question_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prompts(tmp_path, {"prompt": "a"}, {"prompt": "bcd"}, template="constant")
    assert [
        "does not write the question as it is in 1 of 2 rows" in line for line in caplog.messages
    ] == [True]


def test_empty_answers_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prompts(tmp_path, {"prompt": "a", "answer": " "}, answer_column="answer")
    assert ["the answer is empty in 1 of 1 rows" in line for line in caplog.messages] == [True]


def test_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none is named 'default': rag, tool_use"):
        prompts(tmp_path, {"prompt": "a"}, template={"tool_use": CHATML, "rag": CHATML})
