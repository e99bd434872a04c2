"""What columns may hold: answers of any type, nulls, tools, halves of characters."""

from __future__ import annotations

import decimal
import json
import logging
import math
from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from data_cases import CHATML, character_tokenizer, marked, spelled, turns, write_rows
from pyarrow import parquet

from data_sources import data_source
from spmdrl.data.conversations import load_conversations
from spmdrl.data.messages import answer_text
from spmdrl.data.preferences import load_preferences
from spmdrl.data.prompts import load_prompts
from spmdrl.data.row_problems import BadRow

TOOLED = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t['name'] }}{% endfor %}"
    "<|im_end|>\n{% endif %}" + CHATML
)
CALLING = (  # as Llama 3.1's: the key is looked for, then its length is taken
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m['tool_calls']|length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}<|im_start|>assistant\n"
    "{{ m['tool_calls'][0]['function']['name'] }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def answers(tmp_path, column, **changes):
    file = tmp_path / "rows.parquet"
    questions = [f"q{i}" for i in range(len(column))]
    parquet.write_table(pa.table({"question": questions, "answer": column}), file)
    source = data_source(
        source=str(file),
        chat=False,
        **{"prompt_column": "question", "answer_column": "answer", **changes},
    )
    return [p.answer for p in load_prompts(source, character_tokenizer())]


def test_answers_of_parquet_types(tmp_path):
    assert answers(tmp_path, [decimal.Decimal("10"), decimal.Decimal("2")]) == ["10", "2"]
    assert answers(tmp_path, [decimal.Decimal("1.50")]) == ["1.50"]
    assert answers(tmp_path, [2.0, 3.5]) == ["2.0", "3.5"]
    assert answers(tmp_path, [7, -8]) == ["7", "-8"]
    assert answers(tmp_path, [True]) == ["true"]
    assert answers(tmp_path, [date(2026, 1, 2)]) == ["2026-01-02"]
    assert answers(tmp_path, [datetime(2026, 1, 2, 3, 4)]) == ["2026-01-02T03:04:00"]
    assert answers(tmp_path, [[decimal.Decimal("10"), decimal.Decimal("20")]]) == ["[10, 20]"]
    assert answers(tmp_path, pa.array(["a", "b"]).dictionary_encode()) == ["a", "b"]


@pytest.mark.parametrize("missing", [float("nan"), None, float("inf")])
def test_a_missing_number_is_a_missing_answer(tmp_path, missing):
    """pandas writes missing values as NaN."""
    with pytest.raises(ValueError, match=r"rows.parquet: row 1: column 'answer' holds no answer"):
        answers(tmp_path, [2.0, missing])
    assert answers(tmp_path, [2.0, missing, 4.0], on_bad_row="skip") == ["2.0", "4.0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float32(0.5), "0.5"),
        (np.int64(3), "3"),
        (np.array([1, 2]), "[1, 2]"),
        (np.str_("x"), "x"),
        (np.bool_(False), "false"),
        (pd.Timestamp("2026-01-02T03:04:05"), "2026-01-02T03:04:05"),
        (np.datetime64("2026-01-02"), "2026-01-02"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00"),
        ([1.5, decimal.Decimal("2.5")], "[1.5, 2.5]"),
        ("", ""),
    ],
)
def test_answers_of_libraries(value, text):
    assert answer_text(value, "a", None) == text


@pytest.mark.parametrize(
    "value",
    [
        *(None, math.nan, np.float64("nan"), decimal.Decimal("NaN"), pd.NaT, pd.NA),
        *(np.datetime64("NaT"), b"bytes", {"ground_truth": "1"}, {}, 10**5000, "4\udc00"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_answer(value):
    with pytest.raises(BadRow, match="column 'a'"):
        answer_text(value, "a", None)


def test_a_group_that_takes_no_part_is_no_answer():
    with pytest.raises(BadRow, match="has no group 1"):
        answer_text("b", "a", "(a)|b")


def test_a_struct_is_refused_and_its_field_is_a_column(tmp_path):
    """The rows of verl."""
    file = tmp_path / "verl.parquet"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra": {"question": f"raw {i}"},
        }
        for i in range(3)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), file)
    whole = data_source(source=str(file), answer_column="reward_model")
    with pytest.raises(ValueError, match=r"name one of reward_model.style, reward_model.ground_t"):
        load_prompts(whole, character_tokenizer())
    field = data_source(
        source=str(file), answer_column="reward_model.ground_truth", prompt_column="extra.question"
    )
    prompts = load_prompts(field, character_tokenizer())
    assert [(p.text, p.answer) for p in prompts] == [(f"raw {i}", str(i)) for i in range(3)]
    wrong = data_source(source=str(file), answer_column="reward_model.truth")
    with pytest.raises(ValueError, match=r"no column 'reward_model\.truth'"):
        load_prompts(wrong, character_tokenizer())


HALF = "half \ud83d here"


@pytest.mark.parametrize("place", ["question", "answer"])
def test_half_a_character_makes_a_bad_prompt(tmp_path, place):
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2", "note": HALF}]
    file = write_rows(tmp_path, *rows, {**rows[0], place: HALF})
    source = {"source": file, "prompt_column": "question", "answer_column": "answer"}
    with pytest.raises(ValueError, match=rf"rows.jsonl:3: column '{place}': .* half of a char"):
        load_prompts(data_source(**source), character_tokenizer())
    prompts = load_prompts(data_source(**source, on_bad_row="skip"), character_tokenizer())
    assert [p.text for p in prompts] == ["a", "b"]  # what nobody reads harms nobody


@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
def test_half_a_character_makes_a_bad_pair(tmp_path, place):
    row = {"prompt": "a", "chosen": "yes", "rejected": "no"}
    file = write_rows(tmp_path, row, {**row, place: HALF})
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: column '{place}'"):
        load_preferences(data_source(source=file), character_tokenizer())
    kept = load_preferences(data_source(source=file, on_bad_row="skip"), character_tokenizer())
    assert len(kept) == 1


def test_half_a_character_within_a_message(tmp_path):
    messages = [{"role": "user", "content": "a", "name": HALF}, *turns("", "yes")[1:]]
    file = write_rows(tmp_path, {"messages": messages}, {"messages": turns("a", "b")})
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['name'] }}")
    source = data_source(source=file, columns={"messages": "messages"})
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the rendered conversation"):
        load_conversations(source, character_tokenizer(template))
    part = data_source(source=file, columns={"messages": "messages"}, share="1/2")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: "):
        load_conversations(part, character_tokenizer(template))


def conversations(tmp_path, *rows, template, suffix="jsonl", **changes):
    file = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = data_source(source=str(file), columns={"messages": "messages"}, **changes)
    tokenizer = character_tokenizer(template)
    found = load_conversations(source, tokenizer)
    return [marked(tokenizer, c.tokens, c.loss_mask) for c in found], found.left_out


CALL = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "w", "unit": None}]},
    {"role": "tool", "content": "no"},
    {"role": "assistant", "content": "No."},
]


def test_a_null_key_is_no_key(tmp_path):
    """A null in `tool_calls`, as data sets and Arrow write it."""
    rows = [
        {"messages": [{**m, "tool_calls": None} for m in turns(f"a{i}", "b")]} for i in range(2)
    ]
    expected = [
        f"<|im_start|>user\na{i}<|im_end|>\n<|im_start|>assistant\n{{b<|im_end|>}}"
        for i in range(2)
    ]
    assert conversations(tmp_path, *rows, template=CALLING)[0] == expected
    clean = [{"messages": turns(f"a{i}", "b")} for i in range(2)]
    found, left_out = conversations(
        tmp_path, *clean, {"messages": CALL}, template=CALLING, suffix="parquet"
    )
    called = (
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n{w<|im_end|>}\n"
        "<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n{No.<|im_end|>}"
    )
    assert (found, list(left_out)) == ([*expected, called], [])


def test_arrow_fills_nothing_into_calls(tmp_path):
    calls = [
        {"name": "w", "arguments": {"city": "Rome"}},
        {"name": "w", "arguments": {"day": "now"}},
    ]
    rows = [
        {"messages": [{"role": "user", "content": "a", "tool_calls": [call]}, *turns("", "b")[1:]]}
        for call in calls
    ]
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.arguments | tojson }}{% endfor %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    found, _ = conversations(tmp_path, *rows, template=template, suffix="parquet")
    assert [text.split("a<")[0] for text in found] == ['{"city": "Rome"}', '{"day": "now"}']


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "{{ m.x.y.z }}",
            "{{ m.content / 2 }}",
            "{{ m.content[999] + 1 }}",
            "{{ none | length }}",
        ),
        *("{{ m.content | int(default=none) + none }}", "{{ 1 // 0 }}"),
        "{{ raise_exception('no') }}",
    ],
)
def test_whatever_fails_in_a_template_is_a_bad_row(tmp_path, expression):
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if 'bad' in m.content %}" + expression + "{% endif %}{{ m.content }}",
    )
    rows = [{"messages": turns("good", "b")}, {"messages": turns("bad", "b")}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the chat template (refuses|fails on) it"):
        conversations(tmp_path, *rows, template=template)
    found, left_out = conversations(tmp_path, *rows, template=template, on_bad_row="skip")
    assert len(found) == 1 and left_out == {"malformed": 1}


def test_a_template_that_is_none_is_no_row_s_fault(tmp_path):
    with pytest.raises(ValueError, match=r"chat template is none: line 1: "):
        conversations(
            tmp_path, {"messages": turns("a", "b")}, template="{% for %}", on_bad_row="skip"
        )


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_are_handed_to_the_template(tmp_path, as_json):
    tools = [{"name": "weather"}, {"name": "clock"}]
    given = json.dumps(tools) if as_json else tools
    file = write_rows(tmp_path, {"prompt": "a", "tools": given}, {"prompt": "b", "tools": None})
    tokenizer = character_tokenizer(TOOLED)
    first, second = load_prompts(data_source(source=file), tokenizer)
    offered = "<|im_start|>system\nTools: weather clock<|im_end|>\n"
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(tokenizer, first.tokens) == offered + text.format("a")
    assert spelled(tokenizer, second.tokens) == text.format("b")
    assert list(first.tools) == tools and not second.tools
    row = {"messages": turns("a", "b"), "tools": given}
    (learned,), _ = conversations(tmp_path, row, template=TOOLED)
    assert learned == offered + text.format("a") + "{b<|im_end|>}"
    pair = {"prompt": "a", "chosen": "yes", "rejected": "no", "tools": given}
    (found,) = load_preferences(data_source(source=write_rows(tmp_path, pair)), tokenizer)
    assert spelled(tokenizer, found.prompt) == offered + text.format("a")


def test_tools_that_are_none_are_a_bad_row_where_they_are_used(tmp_path, caplog):
    file = write_rows(tmp_path, {"prompt": "a", "tools": "hammer, saw"}, {"prompt": "b"})
    with pytest.raises(ValueError, match=r"rows.jsonl:1: column 'tools' holds no list of tools"):
        load_prompts(data_source(source=file), character_tokenizer(TOOLED))
    with caplog.at_level(logging.WARNING):
        assert len(load_prompts(data_source(source=file), character_tokenizer())) == 2
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1 and "tools" in told[0] and "no place" in told[0]


@pytest.mark.parametrize("margin", [10**400, math.nan, 1e39, True, "2", decimal.Decimal("NaN")])
def test_a_margin_is_a_number_of_float32(tmp_path, margin):
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "chosen": "yes", "rejected": "no"}
    text = json.dumps(margin, default=str) if not isinstance(margin, int) else str(int(margin))
    file.write_text(json.dumps(row)[:-1] + f', "m": {"true" if margin is True else text}}}\n')
    source = data_source(source=str(file), columns={"margin": "m"})
    with pytest.raises(ValueError, match=r"rows.jsonl:1: column 'm' holds no number"):
        load_preferences(source, character_tokenizer())


def test_progress_is_reported_while_a_source_is_read(tmp_path):
    reports = []
    file = write_rows(tmp_path, *[{"prompt": f"q{i}"} for i in range(600)])
    load_prompts(
        data_source(source=file), character_tokenizer(), lambda *report: reports.append(report)
    )
    read, made, encoded = [(256, 0), (512, 0)], [(0, 600), (256, 600), (512, 600)], [(0, 600)]
    assert reports == read + made + encoded
