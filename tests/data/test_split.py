"""Held-out prompts share no question with the training prompts."""

import time
from hashlib import blake2b

import numpy as np
import pytest

from data_sources import data_source
from spmdrl.data.prompts import LoadReport, PromptSet, load_prompts
from spmdrl.data.split import in_part, limited, split, without_overlap


class Characters:
    """A tokenizer of characters."""

    chat_template = None

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        raise NotImplementedError

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [[ord(c) for c in one] for one in text]}


def chain_sum(*, size, seed, max_digits=1):
    parameters = {"min_terms": 2, "max_terms": 2, "max_digits": max_digits}
    source = data_source(
        source="reasoning_gym:chain_sum", task=parameters, size=size, seed=seed, chat=False
    )
    return load_prompts(source, Characters())


def test_a_small_task_space_is_divided_by_question():
    prompts = chain_sum(size=3000, seed=1)
    parts = split(prompts, held_out=80)
    train, held_out = parts.train.texts(), parts.held_out.texts()
    assert len(held_out) == len(set(held_out)) == 80
    assert len(set(train)) == 120 and not set(train) & set(held_out)
    assert "hold 200 distinct questions: 80 are held out (80 prompts), 120 train" in parts.note
    assert all(p.text == bytes(p.tokens).decode() for p in parts.held_out)


def test_the_held_out_questions_depend_on_text_and_seed_alone():
    few, many = chain_sum(size=3000, seed=1), chain_sum(size=4000, seed=2)
    first, again = split(few, held_out=80), split(many, held_out=80)
    assert set(first.held_out.texts()) == set(again.held_out.texts())
    other = split(few, held_out=80, seed=1)
    assert set(other.held_out.texts()) != set(first.held_out.texts())


def test_a_question_is_held_out_in_all_its_phrasings():
    """basic_arithmetic asks for one expression in four ways."""
    parameters = {
        "min_terms": 2,
        "max_terms": 2,
        "max_digits": 1,
        "operators": ["+", "-"],
        "allow_parentheses": False,
        "format_style": "natural",
    }
    source = data_source(
        source="reasoning_gym:basic_arithmetic", task=parameters, size=4000, chat=False
    )
    prompts = load_prompts(source, Characters())
    parts = split(prompts, held_out=201)
    expressions = {p.entry["metadata"]["expression"] for p in parts.held_out}
    assert len(set(parts.held_out.texts())) == len(parts.held_out) == 201
    assert 51 <= len(expressions) < 60
    assert not expressions & {p.entry["metadata"]["expression"] for p in parts.train}


def test_two_sources_are_made_disjoint():
    train = chain_sum(size=300, seed=1, max_digits=2)
    held_out, note = without_overlap(chain_sum(size=300, seed=2, max_digits=2), train.texts())
    assert 0 < len(held_out) < 300 and not set(held_out.texts()) & set(train.texts())
    assert len(set(held_out.texts())) == len(held_out)
    assert f"{len(held_out)} of 300" in note
    with pytest.raises(ValueError, match="each of the 100 held-out questions is also trained on"):
        without_overlap(chain_sum(size=100, seed=2), chain_sum(size=3000, seed=1).texts())


@pytest.mark.parametrize("number", [0, 200, 500, "100%"])
def test_too_many_held_out(number):
    with pytest.raises(
        ValueError, match=f"200 distinct questions with 200 texts: evaluation.held_out={number}"
    ):
        split(chain_sum(size=3000, seed=1), held_out=number)


@pytest.mark.parametrize(
    ("held_out", "at_most", "count"),
    [("10%", None, 20), ("0.1%", None, 1), ("10%", 7, 7), ("10%", 30, 20), (15, 7, 15)],
)
def test_a_share_of_the_questions_is_held_out(held_out, at_most, count):
    parts = split(chain_sum(size=3000, seed=1), held_out=held_out, at_most=at_most)
    assert len(parts.held_out) == count and len(set(parts.train.texts())) == 200 - count


def test_a_bounded_set_is_a_choice_by_text():
    """The evaluated rows depend neither on the number of rows nor on their order."""
    prompts = chain_sum(size=3000, seed=1)
    few, more = limited(prompts, 20), limited(prompts, 60)
    assert len(few) == 20 and set(few.texts()) <= set(more.texts())
    places = [p.prompt_id for p in more]
    assert places == sorted(places)
    turned = prompts.subset(list(reversed(range(3000))))
    assert set(limited(turned, 20).texts()) == set(few.texts())
    assert set(limited(prompts, 20, seed=1).texts()) != set(few.texts())
    assert len(limited(prompts, None)) == 3000


def test_an_empty_subset():
    report = LoadReport(num_rows=0, num_bad=0, num_long=0, longest=0)
    empty = PromptSet([], np.empty(0, np.int32), np.empty(0, np.int64), report)
    assert len(empty.subset([])) == 0 and list(empty) == []


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 49, 100, 333])
def test_parts_are_those_of_equal_shares(count):
    texts = [f"question {i}" for i in range(400)]
    digests = [blake2b(text.encode(), key=b"part0", digest_size=16).digest() for text in texts]
    drawn = [int.from_bytes(digest[:8], "big") * count >> 64 for digest in digests]
    parts = [[i for i, part in enumerate(drawn) if part == number] for number in range(count)]
    for number in {1, 2, count // 2 + 1, count}:
        if number <= count:
            own = [i for i, text in enumerate(texts) if in_part(text, f"{number}/{count}")]
            assert own == parts[number - 1]
    several = [i for i, text in enumerate(texts) if in_part(text, f"1-{count // 2 + 1}/{count}")]
    assert several == sorted(i for part in parts[: count // 2 + 1] for i in part)


def test_one_of_many_parts_takes_no_longer():
    """A public report: 11 ms for each row of `share: 1/1000`."""
    texts = [f"question {i}" for i in range(5000)]
    began = time.perf_counter()
    found = sum(in_part(text, "7/100000") for text in texts)
    assert found < 5 and time.perf_counter() - began < 5
