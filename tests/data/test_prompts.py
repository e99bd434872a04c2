"""Rows to prompts: columns, templates, the chat template, answers, limits and bad rows."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data_sources import data_source
from spmdrl.data.prompts import load_prompts

CHAT = (
    "{% if messages[0]['role'] != 'system' %}<s> default {% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('what role') }}"
    "{% endif %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

GSM8K = [
    {
        "question": "Weng earns $12 an hour. She worked 50 minutes. How much did she earn?",
        "answer": "She earns 12/60 = $<<12/60=0.2>>0.2 a minute.\n0.2 x 50 = 10.\n#### 10",
    },
    {"question": "What is a thousand and 72?", "answer": "Easy.\n#### 1,072 "},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Letters, digits and other single characters as tokens; `[BOS]` before raw text."""
    alphabet = sorted(set(map(chr, range(32, 127))) | {"\n", "é", "$"})
    vocabulary = {"[UNK]": 0, "[BOS]": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 1)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="[BOS]")
    made.chat_template = CHAT
    return made


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        file = tmp_path / "rows.jsonl"
        file.write_text(
            "".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in rows)
        )
        return str(file)

    return write


def read_back(tokenizer, prompt):
    return "".join(tokenizer.convert_ids_to_tokens(prompt.tokens))


def test_gsm8k(tokenizer, write):
    source = data_source(
        source=write(*GSM8K),
        prompt_column="question",
        answer_column="answer",
        answer_pattern=r"####\s*(.+)",
        template="{prompt} End with {} and \\boxed{x}.",
        system="Think.",
    )
    prompts = load_prompts(source, tokenizer)
    assert [p.answer for p in prompts] == ["10", "1,072"]
    second = prompts[1]
    assert second.text == "What is a thousand and 72? End with {} and \\boxed{x}."
    assert second.messages == (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": second.text},
    )
    assert read_back(tokenizer, second) == f"<system> Think. <user> {second.text} <assistant>"
    assert second.entry == GSM8K[1] and second.prompt_id == 1
    assert prompts.lengths.tolist() == [len(p.tokens) for p in prompts]


def test_raw_text_has_no_messages(tokenizer, write):
    prompts = load_prompts(data_source(source=write({"prompt": "a b"}), chat=False), tokenizer)
    assert read_back(tokenizer, prompts[0]) == "[BOS]a b"
    assert prompts[0].messages == () and prompts[0].answer is None


def test_the_template_brings_its_own_system_prompt(tokenizer, write):
    source = write({"prompt": "a"})
    default = load_prompts(data_source(source=source), tokenizer)[0]
    assert read_back(tokenizer, default) == "<s> default <user> a <assistant>"
    empty = load_prompts(data_source(source=source, system=""), tokenizer)[0]
    assert read_back(tokenizer, empty) == "<system>  <user> a <assistant>"


def test_conversations(tokenizer, write):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    source = data_source(source=write({"chat": turns}), columns={"messages": "chat"}, system="S")
    prompt = load_prompts(source, tokenizer)[0]
    assert prompt.text == "c"
    assert read_back(tokenizer, prompt) == "<system> S <user> a <assistant> b <user> c <assistant>"


def test_answers_that_are_not_text(tokenizer, write):
    file = write({"prompt": "a", "answer": 7}, {"prompt": "b", "answer": [1, 2]})
    prompts = load_prompts(data_source(source=file, answer_column="answer"), tokenizer)
    assert [p.answer for p in prompts] == ["7", "[1, 2]"]


def test_seeds(tokenizer):
    source = data_source(source="seeds", size=4)
    prompts = load_prompts(source, tokenizer)
    assert len(prompts) == 4 and prompts[0].answer is None
    assert prompts[1].messages[-1]["content"] == "game 1"


def test_reasoning_gym(tokenizer):
    source = data_source(
        source="reasoning_gym:chain_sum",
        task={"min_terms": 2, "max_terms": 2, "max_digits": 1},
        size=5,
        template="{prompt} Answer with the number only.",
    )
    prompts = load_prompts(source, tokenizer)
    assert len(prompts) == 5
    for prompt in prompts:
        assert prompt.text.endswith(" = Answer with the number only.")
        expression = prompt.entry["metadata"]["expression"]
        assert expression in prompt.text and prompt.answer == str(eval(expression))


def test_long_prompts_are_left_out_and_counted(tokenizer, write, caplog):
    file = write({"prompt": "a" * 50}, {"prompt": "b"}, {"prompt": "c" * 60})
    prompts = load_prompts(data_source(source=file, max_tokens=40), tokenizer)
    assert [(p.prompt_id, p.text) for p in prompts] == [(1, "b")]
    assert prompts.report.num_long == 2 and prompts.report.num_rows == 3
    assert "1 of 3 rows are used (left out: 2 longer than data.train.max_tokens=40" in caplog.text
    with pytest.raises(ValueError, match="leaves no example of 3 rows: 3 longer than"):
        load_prompts(data_source(source=file, max_tokens=10), tokenizer)


BAD = [
    ("", "the line is empty"),
    ("{", "not JSON"),
    ({"answer": "1"}, "'prompt' holds no text but None"),
    ({"prompt": "  ", "answer": "1"}, "'prompt' holds no text but '  '"),
    ({"prompt": 5, "answer": "1"}, "'prompt' holds no text but 5"),
    ({"prompt": "a"}, "'answer' holds no answer"),
    ({"prompt": "a", "answer": "none"}, r"'none' does not match '\[0-9\]\+'"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_a_bad_row_is_an_error_with_file_and_line(tokenizer, write, row, problem):
    file = write({"prompt": "a", "answer": "1"}, row)
    source = data_source(source=file, answer_column="answer", answer_pattern="[0-9]+")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{problem}.*on_bad_row"):
        load_prompts(source, tokenizer)


def test_or_bad_rows_are_skipped_and_counted(tokenizer, write, caplog):
    file = write(*[row for row, _ in BAD], {"prompt": "a", "answer": "1"})
    source = data_source(
        source=file, answer_column="answer", answer_pattern="[0-9]+", on_bad_row="skip"
    )
    prompts = load_prompts(source, tokenizer)
    assert [p.prompt_id for p in prompts] == [len(BAD)]
    assert prompts.report.num_bad == len(BAD) == caplog.text.count("; left out")
    with pytest.raises(ValueError, match=r"leaves no example of 1 rows: 1 malformed"):
        load_prompts(data_source(source=write("[]"), on_bad_row="skip"), tokenizer)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("text", "no conversation"),
        ([], "no conversation"),
        ([{"role": "user"}], "no message with role and content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "waits"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "what role"),
    ],
)
def test_a_bad_conversation_is_a_bad_row(tokenizer, write, messages, problem):
    source = data_source(source=write({"chat": messages}), columns={"messages": "chat"})
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{problem}"):
        load_prompts(source, tokenizer)


def test_a_missing_column_names_those_there_are(tokenizer, write):
    file = write({"question": "a", "solution": "1"})
    with pytest.raises(
        ValueError, match=r"no column 'prompt' \(data.train.prompt_column\); it has \['quest"
    ):
        load_prompts(data_source(source=file, on_bad_row="skip"), tokenizer)
    source = data_source(source=file, prompt_column="question", answer_column="answer")
    with pytest.raises(ValueError, match=r"'answer' \(data.train.answer_column\).*, or null"):
        load_prompts(source, tokenizer)


def test_an_empty_file(tokenizer, write):
    with pytest.raises(ValueError, match="leaves no example of 0 rows"):
        load_prompts(data_source(source=write()), tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "no place"}, "must contain {prompt}"),
        ({"answer_pattern": "("}, "answer_pattern\n.*unterminated"),
        ({"columns": {"messages": "m"}, "template": "{prompt}!"}, "takes whole conversations"),
        ({"system": "S", "chat": False}, "with chat=false"),
    ],
)
def test_settings_that_do_not_go_together(settings, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        load_prompts(data_source(source="a.jsonl", **settings), tokenizer)


def test_a_tokenizer_without_a_chat_template(tokenizer, write):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template: set chat to false"):
        load_prompts(data_source(source=write({"prompt": "a"})), bare)


def test_a_prompt_set_is_a_sequence(tokenizer, write):
    file = write(*[{"prompt": word} for word in ("one", "two", "three")])
    prompts = load_prompts(data_source(source=file), tokenizer)
    assert [p.text for p in prompts[1:]] == ["two", "three"]
    assert prompts[-1].text == "three" and prompts[-1].tokens == prompts.subset([2])[0].tokens
    assert [p.text for p in reversed(prompts)] == ["three", "two", "one"]
    with pytest.raises(IndexError):
        prompts[3]
