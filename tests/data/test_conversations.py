"""The loss mask of conversations: answers and their ends, in any chat template."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from data_cases import (
    BRACKETS,
    CHATML,
    CLOSING,
    ENDLESS,
    STRIPPING,
    character_tokenizer,
    marked,
    prefix_space_tokenizer,
    spelled,
    turns,
    write_rows,
)

from data_sources import data_source
from spmdrl.data.conversations import Conversation, load_conversations
from spmdrl.data.item_set import ItemSet
from spmdrl.data.prompts import load_prompts
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.training.packing import loss_mask

MODEL = Path(
    os.environ.get(
        "SPMDRL_TEST_MODEL", Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
    )
)
MESSAGES = {"messages": "messages"}


def load(directory: Path, tokenizer: Any, *rows: Any, **settings: Any) -> ItemSet[Conversation]:
    source = data_source(source=write_rows(directory, *rows), **settings)
    return load_conversations(source, tokenizer)


def all_marked(tokenizer: Any, conversations: ItemSet[Conversation]) -> list[str]:
    return [marked(tokenizer, item.tokens, item.loss_mask) for item in conversations]


TEMPLATES = {
    "chatml": (
        CHATML,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{b <|im_end|>}\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{d<|im_end|>}",
    ),
    "end of turn is not end of text": (
        STRIPPING,
        "<|turn|>user\na<|end|>\n<|turn|>assistant\n{b<|end|>}\n"
        "<|turn|>user\nc<|end|>\n<|turn|>assistant\n{d<|end|>}",
    ),
    "end of text behind the last turn": (
        CLOSING,
        "<|turn|>user\na<|end|>\n<|turn|>assistant\n{b <|end|>}\n"
        "<|turn|>user\nc<|end|>\n<|turn|>assistant\n{d<|end|>}",
    ),
    "no header": (BRACKETS, "[INST] a [/INST]{ b  <|im_end|>}[INST] c [/INST]{ d <|im_end|>}"),
    "no end": (ENDLESS, "user: a\nassistant: {b} \nuser: c\nassistant: {d<|im_end|>}"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_answers_with_their_ends(tmp_path: Path, name: str) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = character_tokenizer(template)
    # what follows the last answer is of no use
    row = {"messages": turns("a", "b ", "c", "d", "e")}
    assert all_marked(tokenizer, load(tmp_path, tokenizer, row, columns=MESSAGES)) == [expected]


def test_a_system_prompt_unless_the_conversation_has_one(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(ENDLESS)
    own = [{"role": "system", "content": "own"}, *turns("a", "b")]
    rows = [{"messages": own}, {"messages": turns("a", "b")}]
    loaded = load(tmp_path, tokenizer, *rows, columns=MESSAGES, system="S")
    assert all_marked(tokenizer, loaded) == [
        "system: own\nuser: a\nassistant: {b<|im_end|>}",
        "system: S\nuser: a\nassistant: {b<|im_end|>}",
    ]
    assert loaded.texts() == ["a", "a"]


def test_prompt_and_response(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(ENDLESS)
    loaded = load(
        tmp_path,
        tokenizer,
        {"q": "a", "chosen": "b"},
        {"q": turns("a", "b", "c"), "chosen": "d"},
        {"q": "a", "chosen": turns("a", "b")},
        prompt_column="q",
        columns={"response": "chosen"},
        template="<{prompt}>",
    )
    assert all_marked(tokenizer, loaded) == [
        "user: <a>\nassistant: {b<|im_end|>}",
        "user: a\nassistant: {b}\nuser: c\nassistant: {d<|im_end|>}",
        "user: <a>\nassistant: {b<|im_end|>}",
    ]
    assert loaded.texts() == ["a", "a", "a"]  # before the template


def test_raw_text(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(None)
    row = {"prompt": "a ", "response": "b<|im_end|>c"}
    loaded = load(tmp_path, tokenizer, row, chat=False)
    assert all_marked(tokenizer, loaded) == ["[BOS]a {b<|im_end|>c<|im_end|>}"]


def test_the_prompt_is_tokenised_as_in_generation(tmp_path: Path) -> None:
    """Where a token reaches over the boundary, the answer is encoded by itself."""
    tokenizer = character_tokenizer(CHATML, merges=["\n\n"])
    (item,) = load(tmp_path, tokenizer, {"prompt": "a\n\n", "response": "\nb"})
    prompts = load_prompts(data_source(source=write_rows(tmp_path, {"prompt": "a\n\n"})), tokenizer)
    start = item.responses[0][0]
    assert tuple(item.tokens[:start]) == prompts[0].tokens
    assert tokenizer.convert_ids_to_tokens(list(item.tokens[start:])) == ["\n", "b", "<|im_end|>"]
    assert "\n\n" in tokenizer.convert_ids_to_tokens(list(item.tokens))


def test_an_answer_goes_on_where_the_prompt_stops(tmp_path: Path) -> None:
    """No second prefix space before the answer, with tokenizers that begin every text with one."""
    tokenizer = prefix_space_tokenizer(BRACKETS)
    loaded = load(tmp_path, tokenizer, {"prompt": "a", "response": "b"})
    assert all_marked(tokenizer, loaded) == ["▁[INST]▁a▁[/INST]{▁b▁<|im_end|>}"]


DROPS_HISTORY = (  # as templates that drop the reasoning of earlier answers
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split(';')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_what_was_said_makes_several_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each turn is trained once, after what the model saw before it."""
    tokenizer = character_tokenizer(DROPS_HISTORY)
    rows = [{"messages": turns("a", "think;b", "c", "d", "e", "f")}, {"messages": turns("g", "h")}]
    with caplog.at_level(logging.INFO):
        loaded = load(tmp_path, tokenizer, *rows, columns=MESSAGES, unique=True)
    assert all_marked(tokenizer, loaded) == [
        "<|turn|>user\na<|end|>\n<|turn|>assistant\n{think;b<|end|>}",
        "<|turn|>user\na<|end|>\n<|turn|>assistant\nb<|end|>\n"
        "<|turn|>user\nc<|end|>\n<|turn|>assistant\n{d<|end|>}\n"
        "<|turn|>user\ne<|end|>\n<|turn|>assistant\n{f<|end|>}",
        "<|turn|>user\ng<|end|>\n<|turn|>assistant\n{h<|end|>}",
    ]
    assert "1 of 2 conversations became 2 rows" in caplog.text
    assert "2 of 2 rows are used" in caplog.text
    single = load(tmp_path, tokenizer, {"messages": turns("a", "think;b")}, columns=MESSAGES)
    assert all_marked(tokenizer, single) == [
        "<|turn|>user\na<|end|>\n<|turn|>assistant\n{think;b<|end|>}"
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", "not write the generation"),
        (CHATML.replace("m['content']", "m['content'] | upper"), "'answer' becomes 'ANSWER"),
        ("{{ raise_exception('no such roles') }}", "refuses it: no such roles"),
    ],
)
def test_templates_that_do_not_show_the_answer(tmp_path: Path, template: str, message: str) -> None:
    row = {"prompt": "a", "response": "answer"}
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{message}"):
        load(tmp_path, character_tokenizer(template), row)


def test_rows_of_a_step(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(ENDLESS)
    rows = [{"messages": turns("a", "bb", "c", "ddd")}, {"messages": turns("e", "f")}]
    batch = load(tmp_path, tokenizer, *rows, columns=MESSAGES).rows([1, 0], 7)
    assert batch["prompt_ids"].tolist() == [7, 8] and batch["sample_index"].tolist() == [0, 0]
    assert batch["prompt_lengths"].tolist() == [len("user: e\nassistant: ")] * 2
    assert batch["response_lengths"].tolist() == [2, 6]
    assert batch.row_sum(batch["loss_mask"]).tolist() == [2, 6]
    assert marked(tokenizer, batch["tokens"].tolist(), batch["loss_mask"].tolist()) == (
        "user: e\nassistant: {f<|im_end|>}user: a\nassistant: {bb}\nuser: c\nassistant: "
        "{ddd<|im_end|>}"
    )
    assert loss_mask(batch).tolist() == batch["loss_mask"].tolist()


def test_no_rows_have_the_same_columns(tmp_path: Path) -> None:
    data = load(tmp_path, character_tokenizer(), {"prompt": "a", "response": "b"})
    none, one = data.rows([], 0), data.rows([0], 0)
    assert len(none) == 0 and none.columns() == one.columns()
    assert [none[c].dtype for c in none.columns()] == [one[c].dtype for c in one.columns()]


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = character_tokenizer(ENDLESS)
    rows = [
        {"messages": turns("a", " ", "c", "d")},
        {"messages": turns("a", "b" * 40)},
        {"messages": turns("a", "b")},
        {"messages": turns("a", "x")},
        {"messages": turns("a", "b", "c", "d")},
        "{",
        {"messages": [{"role": "user"}]},
    ]
    settings = {"columns": MESSAGES, "on_bad_row": "skip", "unique": True}
    loaded = load(tmp_path, tokenizer, *rows, max_tokens=45, **settings)
    assert all_marked(tokenizer, loaded) == ["user: a\nassistant: {b<|im_end|>}"]
    assert loaded.left_out == {
        "with an empty response": 1,
        "longer than data.train.max_tokens=45": 1,
        "with a prompt that an earlier row has": 2,
        "malformed": 2,
    }
    line = "1 of 7 rows are used (left out: 1 longer than data.train.max_tokens=45, 2 malformed ("
    assert line in caplog.text
    with pytest.raises(
        ValueError, match=r"leaves no example of 7 rows: 4 longer.*, 2 malformed \(.*:6: not JSON"
    ):
        load(tmp_path, tokenizer, *rows, max_tokens=5, **settings)


def test_the_limit_counts_all_tokens(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(ENDLESS)
    row = {"prompt": "a", "response": "b"}
    size = len("user: a\nassistant: b") + 1
    assert len(load(tmp_path, tokenizer, row, max_tokens=size)[0].tokens) == size
    with pytest.raises(ValueError, match="leaves no example"):
        load(tmp_path, tokenizer, row, max_tokens=size - 1)


def test_unique_goes_by_the_whole_prompt(tmp_path: Path) -> None:
    """Equal last or first messages do not make equal prompts."""
    rows = [
        {"prompt": turns("hi", "yes?", "a"), "response": "1"},
        {"prompt": turns("hi", "yes?", "b"), "response": "2"},
        {"prompt": turns("ho", "yes?", "a"), "response": "3"},
        {"prompt": turns("hi", "yes?", "a"), "response": "4"},
    ]
    prompts = data_source(source=write_rows(tmp_path, *rows), unique=True)
    tokenizer = character_tokenizer(ENDLESS)
    assert [p.prompt_id for p in load_prompts(prompts, tokenizer)] == [0, 1, 2]
    # a conversation's prompt is what precedes its first answer
    assert load(tmp_path, tokenizer, *rows, unique=True).texts() == ["hi", "ho"]


BAD = [
    ({"messages": turns("a")}, "no assistant message"),
    ({"messages": turns("a", "b")[1:]}, "begins with a response"),
    ({"messages": "text"}, "holds no conversation but 'text'"),
    ({"messages": []}, r"holds no conversation but \[\]"),
    ({"messages": [{"from": "human", "value": "a"}]}, "no message with role and content"),
    ("{", "not JSON"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_a_bad_row_is_an_error_with_file_and_line(tmp_path: Path, row: Any, problem: str) -> None:
    rows = [{"messages": turns("a", "b")}, row]
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{problem}.*on_bad_row"):
        load(tmp_path, character_tokenizer(), *rows, columns=MESSAGES)


BAD_PAIRS = [
    ({"prompt": "a", "response": None}, "'response' holds no text and no conversation but None"),
    ({"prompt": 5, "response": "b"}, "'prompt' holds no text but 5"),
    ({"prompt": turns("a", "b"), "response": "b"}, "no conversation that waits"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_PAIRS)
def test_a_bad_prompt_or_response(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{problem}"):
        load(tmp_path, character_tokenizer(), row)


def test_prompts_are_in_a_column_or_before_the_answers(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    whole = {"response": turns("a", "b")}
    assert len(load(tmp_path, tokenizer, whole)) == 1
    with pytest.raises(ValueError, match=r"no column 'prompt' \(data.train.prompt_column\)"):
        load(tmp_path, tokenizer, {"response": "b"}, on_bad_row="skip")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: there is no column 'prompt' for the prom"):
        load(tmp_path, tokenizer, whole, {"response": "b"})


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    row = {"prompt": turns("a"), "response": "b", "messages": turns("a", "b")}
    bare = character_tokenizer(None)
    with pytest.raises(ValueError, match=r"columns\.messages holds conversations"):
        load(tmp_path, bare, row, columns=MESSAGES, chat=False)
    with pytest.raises(ValueError, match="'prompt' holds messages, which need chat=True"):
        load(tmp_path, bare, row, chat=False)
    with pytest.raises(ValueError, match="no chat template: set chat to false"):
        load(tmp_path, bare, row)


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no eos_token to end responses"):
        load(tmp_path, character_tokenizer(eos=None), {"prompt": "a", "response": "b"})


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    row = {"prompt": "a", "answer": "b"}
    with pytest.raises(ValueError, match=r"no column 'response' .*; it has \['answer', 'prompt'\]"):
        load(tmp_path, character_tokenizer(), row, on_bad_row="skip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "x"}, "must contain {prompt}"),
        ({"columns": {"answer": "b"}}, "'answer' is none of"),
        ({"share": "0/2"}, "share\n.*write all"),
        ({"share": "3/2"}, "share\n.*write all"),
        ({"share": "half"}, "share\n.*write all"),
        ({"system": "S", "chat": False}, "with chat=false"),
    ],
)
def test_settings_that_cannot_be(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_conversations(data_source(source="a.jsonl", **settings), character_tokenizer())


def test_a_conversation_set_is_a_sequence(tmp_path: Path) -> None:
    rows = [{"prompt": word, "response": "r"} for word in ("one", "two", "three")]
    data = load(tmp_path, character_tokenizer(), *rows)
    assert data[1:].texts() == ["two", "three"] and data[-1].text == "three"
    assert [item.text for item in reversed(data)] == ["three", "two", "one"]


@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"{MODEL} is missing")
def test_the_mask_of_a_real_template(tmp_path: Path) -> None:
    """The tokens are those of the whole conversation, but for the line break after its end."""
    tokenizer = load_tokenizer(MODEL)
    messages = turns("What is 2 + 3?", "It is 5.", "And 4?", "\nThat is 9.\n\n")
    (item,) = load(tmp_path, tokenizer, {"messages": messages}, columns=MESSAGES)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(item.tokens) == whole[:-1]
    answers = [spelled(tokenizer, item.tokens[a:b]) for a, b in item.responses]
    assert answers == ["ItĠisĠ5.<|im_end|>", "ĊThatĠisĠ9.ĊĊ<|im_end|>"]
    before = tokenizer.apply_chat_template(
        messages[:3], add_generation_prompt=True, return_dict=False
    )
    assert list(item.tokens[: item.responses[1][0]]) == before
