"""Preference pairs: what becomes of rows, their tokens, parts and held-out prompts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import CHATML, character_tokenizer

from data_sources import data_source
from spmdrl.data.item_set import ItemSet
from spmdrl.data.preferences import Pair, load_preferences, mismatched
from spmdrl.data.prompts import load_prompts
from spmdrl.data.split import in_part, split_examples

GOOD = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> ItemSet[Pair]:
    return load_preferences(
        data_source(source=write(path / "pairs.jsonl", rows), **settings), character_tokenizer()
    )


def test_a_pair_is_two_rows_with_one_prompt(tmp_path):
    pairs = load(tmp_path, [GOOD, {"prompt": "Go", "chosen": "a", "rejected": "bb"}])
    tokenizer = character_tokenizer(CHATML)
    batch = pairs.rows([0, 1], 7)
    texts = [tokenizer.decode(t) for t in torch.split(batch["tokens"], batch.lengths.tolist())]
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    strip = [text.replace(" ", "") for text in texts]
    assert strip[0] == f"{start}yes<|im_end|>" and strip[1] == f"{start}no<|im_end|>"
    assert batch["prompt_ids"].tolist() == [7, 7, 8, 8]
    assert batch["sample_index"].tolist() == [0, 1, 0, 1]
    assert batch["response_lengths"].tolist() == [4, 3, 2, 3], "the end of the turn is learnt"
    assert (batch["prompt_lengths"] + batch["response_lengths"]).equal(batch.lengths)
    assert batch.row_sum(batch["loss_mask"]).equal(batch["response_lengths"])
    for row, mask in enumerate(torch.split(batch["loss_mask"], batch.lengths.tolist())):
        assert not mask[: int(batch["prompt_lengths"][row])].any()
    assert batch["margin"].tolist() == [0.0] * 4
    assert batch.objects["prompt_text"] == ["Hi", "Hi", "Go", "Go"]


def test_a_rank_without_pairs_has_the_same_columns(tmp_path):
    pairs = load(tmp_path, [GOOD])
    none, some = pairs.rows([], 0), pairs.rows([0], 0)
    assert len(none) == 0 and none.columns() == some.columns()
    for name in ("tokens", "loss_mask", "margin", "prompt_ids"):
        assert none[name].dtype == some[name].dtype


def test_what_cannot_be_used_is_counted_and_left_out(tmp_path, caplog):
    rows = [
        GOOD,
        {**GOOD, "rejected": "yes"},
        {**GOOD, "rejected": "  "},
        {**GOOD, "chosen": "y" * 200},
        {**GOOD, "chosen": 3},
    ]
    with caplog.at_level(logging.WARNING):
        pairs = load(tmp_path, rows, max_tokens=100, on_bad_row="skip")
    assert len(pairs) == 1
    text = caplog.text
    for part in ("equal responses", "empty response", "data.train.max_tokens=100", "pairs.jsonl:5"):
        assert part in text, text
    with pytest.raises(ValueError, match=r"pairs.jsonl:5: .*chosen"):
        load(tmp_path, rows)
    with pytest.raises(ValueError, match=r"no column 'better'.*'chosen'"):
        load(tmp_path, rows, columns={"chosen": "better"})
    every = (
        r"'better' \(data.train.columns.chosen\), no column 'asked' \(data.train.prompt_column\)"
    )
    with pytest.raises(ValueError, match=every):  # all that are missing in one line
        load(tmp_path, rows, columns={"chosen": "better"}, prompt_column="asked")


def test_conversations_give_the_prompt_and_margins_are_read(tmp_path):
    asked = [{"role": "user", "content": "Hi"}]
    row = {
        "chosen": [*asked, {"role": "assistant", "content": "yes"}],
        "rejected": [*asked, {"role": "assistant", "content": "no"}],
        "gap": 2,
    }
    whole = load(tmp_path, [row], columns={"margin": "gap"})
    plain = load(tmp_path, [GOOD])
    assert whole.rows([0], 0)["tokens"].equal(plain.rows([0], 0)["tokens"])
    assert whole.rows([0], 0)["margin"].tolist() == [2.0, 2.0]
    other = {**row, "rejected": [{"role": "user", "content": "Ho"}, row["rejected"][1]]}
    with pytest.raises(ValueError, match="differ"):
        load(tmp_path, [other], columns={"margin": "gap"})


def many(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i // 3}", "chosen": f"a{i}", "rejected": f"b{i}"}
        for i in range(count)
    ]


def test_no_prompt_is_on_both_sides_of_a_split(tmp_path):
    pairs = load(tmp_path, many(60))
    parts = split_examples(pairs, held_out=10, seed=1)
    held, train = set(parts.held_out.texts()), set(parts.train.texts())
    assert not held & train and len(held | train) == 20
    assert 10 <= len(parts.held_out) <= 12 and len(parts.held_out) % 3 == 0
    # which prompts are held out does not depend on other rows
    fewer = split_examples(load(tmp_path, many(30)), held_out=3, seed=1)
    assert len(fewer.train) + len(fewer.held_out) == 30
    with pytest.raises(ValueError, match="leave a prompt to train on"):
        split_examples(pairs, held_out=60)


def test_parts_are_disjoint_by_prompt_and_complete(tmp_path):
    rows = many(120)
    parts = [set(load(tmp_path, rows, share=f"{i}/3").texts()) for i in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40
    assert min(map(len, parts)) > 5
    for i, part in enumerate(parts):
        assert all(in_part(text, f"{i + 1}/3") for text in part)
    joined = set(load(tmp_path, rows, share="2-3/3").texts())
    assert joined == parts[1] | parts[2]
    for bad in ("4/3", "0/2", "half", "1/0", "3-2/4", "1-5/4"):
        with pytest.raises(ValueError, match=f"write all, .*input_value='{bad}'"):
            data_source(source="x", share=bad)


def test_a_preference_file_is_also_a_source_of_prompts(tmp_path):
    path = write(tmp_path / "pairs.jsonl", many(12))
    source = data_source(source=path, prompt_column="prompt", answer_column="chosen", unique=True)
    prompts = load_prompts(source, character_tokenizer())
    assert prompts.texts() == [f"Question {i}" for i in range(4)]
    assert prompts[1].answer == "a3"
    assert prompts.report.num_bad == 0


def test_mismatched_pairs_have_answers_to_another_prompt(tmp_path):
    rows = [
        {"prompt": "aa", "chosen": "c0", "rejected": "r0"},
        {"prompt": "aa", "chosen": "c1", "rejected": "r1"},
        {"prompt": "b", "chosen": "c2" * 9, "rejected": "r2"},
        {"prompt": "aa", "chosen": "c3", "rejected": "r3"},
    ]
    pairs = load(tmp_path, rows)
    other = mismatched(pairs)
    assert [item.prompt for item in other] == [item.prompt for item in pairs]
    # the next item with another prompt, around the end of the set
    assert [item.rejected_text for item in other] == ["r2", "r2", "r3", "r2"]
    longest = max(pairs.rows(range(4), 0).lengths)
    lengths = other.rows(range(4), 0).lengths
    assert max(lengths) == longest and int((lengths == longest).sum()) == 3
    with pytest.raises(ValueError, match="2 pairs have one prompt"):
        mismatched(load(tmp_path, rows[:2]))


def test_a_prompt_that_leaves_no_room_has_a_reason_of_its_own(tmp_path):
    pairs = load(tmp_path, [GOOD, {**GOOD, "prompt": "x" * 200}], max_tokens=100)
    assert pairs.left_out == {"whose prompt leaves no room within data.train.max_tokens=100": 1}


def lengths_of(pairs: ItemSet[Pair]) -> list[int]:
    return [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]


def test_the_limit_of_length_follows_the_rows(tmp_path, caplog):
    """The longest twentieth is left out, or what `max_tokens` leaves out of them."""
    rows = [{**GOOD, "prompt": f"{i:04}", "chosen": "y" * (i + 1)} for i in range(100)]
    whole = sorted(lengths_of(load(tmp_path, rows)))
    for share, count in (("95%", 95), ("7%", 7), ("100%", 100), ("2.5%", 3)):
        kept = load(tmp_path, rows, keep_shortest=share)
        assert sorted(lengths_of(kept)) == whole[:count], share
    caplog.clear()
    kept = load(tmp_path, rows, keep_shortest="95%", key="data.mix.0")
    limit = whole[94]
    reason = f"longer than {limit} tokens (data.mix.0.keep_shortest=95%)"
    assert kept.left_out == {reason: 5}
    line = f"95 of 100 rows are used (left out: 5 {reason}; the longest has {whole[-1]} tokens"
    assert [r.getMessage().count(line) for r in caplog.records] == [1]
    # where many are too long, the share that is asked for is not taken from the others again
    bounded = load(tmp_path, rows, keep_shortest="95%", max_tokens=whole[49])
    assert sorted(lengths_of(bounded)) == whole[:50]
    assert bounded.left_out == {f"longer than data.train.max_tokens={whole[49]}": 50}


def test_the_limit_of_length_is_that_of_the_part(tmp_path):
    rows = [{**GOOD, "prompt": f"{i:04}", "chosen": "y" * (i + 1)} for i in range(200)]
    part = load(tmp_path, rows, share="1/2")
    kept = load(tmp_path, rows, share="1/2", keep_shortest="90%", max_tokens=5000)
    assert sorted(lengths_of(kept)) == sorted(lengths_of(part))[: len(kept)]
    assert 0 <= len(kept) - 0.9 * len(part) < 1
    assert kept.left_out["not in share 1/2"] == 200 - len(part)


def test_many_malformed_rows_are_told_in_few_lines(tmp_path, caplog):
    rows = [GOOD, *({**GOOD, "chosen": 3} for _ in range(50))]
    assert load(tmp_path, rows, on_bad_row="skip").left_out == {"malformed": 50}
    assert len(caplog.records) == 11 and "only counted" in caplog.records[9].getMessage()
    said = caplog.records[10].getMessage()
    assert (
        "1 of 51 rows are used (left out: 50 malformed (" in said and "pairs.jsonl:2: col" in said
    )
