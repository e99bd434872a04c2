"""A reward model with its own tokenizer reads the rows that the flow `reward_model` trains on."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from data_sources import data_source
from spmdrl.data.preferences import load_preferences
from spmdrl.data.prompts import Prompt
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.rewards.retokenizing import retokenizer
from tiny_model import make_tiny_model

NOW = datetime(2026, 1, 2)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")

ASKED: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is my name?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I am Ada."},
        {"role": "assistant", "content": "Hello, Ada."},
        {"role": "user", "content": "What is my name?"},
    ],
]
ANSWERS = ("Ada.", "I do not know,\nsorry")


def model(directory: Path, template: str | None) -> Path:
    make_tiny_model(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return directory


def trained_on(root: Path, directory: Path, asked: Any, *, chat: bool) -> list[list[int]]:
    """The rows of a pair, as `reward_model` makes them."""
    row = {"prompt": asked, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    (root / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    source = data_source(source=str(root / "pairs.jsonl"), chat=chat, now=NOW)
    batch = load_preferences(source, load_tokenizer(directory)).rows([0], 0)
    return [row.tolist() for row in torch.split(batch["tokens"], batch.lengths.tolist())]


def prompt_of(messages: list[dict[str, str]], text: str) -> Prompt:
    return Prompt(
        prompt_id=0, text=text, messages=tuple(messages), tokens=(5,), answer=None, entry={}
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, ENDLESS])
@pytest.mark.parametrize("asked", ASKED)
def test_conversations_are_read_to_the_end_of_the_turn(
    tmp_path: Path, template: str, asked: list[dict[str, str]]
) -> None:
    directory = model(tmp_path / "model", template)
    encode = retokenizer("reward", directory, NOW, chat=True)
    prompt = prompt_of(asked, asked[-1]["content"])
    rows = trained_on(tmp_path, directory, asked, chat=True)
    assert [list(encode(prompt, answer, False)) for answer in ANSWERS] == rows
    # the end is one token here, and a response that was cut has not come to it
    assert [list(encode(prompt, answer, True)) for answer in ANSWERS] == [r[:-1] for r in rows]


def test_raw_text_is_read_to_the_end_of_text(tmp_path: Path) -> None:
    directory = model(tmp_path / "model", None)
    encode = retokenizer("reward", directory, NOW, chat=False)
    prompt = prompt_of([], "2 + 2 = ")
    rows = trained_on(tmp_path, directory, "2 + 2 = ", chat=False)
    assert [list(encode(prompt, answer, False)) for answer in ANSWERS] == rows
    assert [list(encode(prompt, answer, True)) for answer in ANSWERS] == [r[:-1] for r in rows]


def test_an_answer_that_the_template_rewrites_is_read_as_written(tmp_path: Path) -> None:
    directory = model(tmp_path / "model", FORGETFUL)
    encode = retokenizer("reward", directory, NOW, chat=True)
    prompt = prompt_of(ASKED[0], "What is my name?")
    thought = encode(prompt, "<think>Who?</think>Ada.", False)
    assert list(thought) == list(encode(prompt, "Ada.", False))


def test_conversations_need_a_template(tmp_path: Path) -> None:
    directory = model(tmp_path / "model", None)
    with pytest.raises(ValueError, match=r"roles\.judge\.retokenize=true.*no chat template"):
        retokenizer("judge", directory, NOW, chat=True)
