"""Result files are whole or not there."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from harness import run_ranks
from spmdrl.batch import from_rows
from spmdrl.evaluation.evaluator import Evaluator
from spmdrl.evaluation.results import write_results


def test_rows_in_order_with_null_for_nan(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    rows = [{"response": "é\n", "reward": float("nan")}, {"parts": [1.0, float("inf")], "n": 1}]
    assert write_results(path, rows) == 2
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"response": "é\n", "reward": None},
        {"parts": [1.0, None], "n": 1},
    ]
    assert os.listdir(path.parent) == ["out.jsonl"]


def test_a_failure_leaves_the_older_file(tmp_path):
    path = tmp_path / "out.jsonl"
    write_results(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_results(path, rows())
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_half_of_a_pair_of_surrogates_is_written_and_read(tmp_path):
    path = tmp_path / "out.jsonl"
    rows = [{"prompt": "é \ud83d", "answer": "4\udc00"}, {"prompt": "é"}]
    write_results(path, rows)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == rows
    assert "é" in path.read_text(encoding="utf-8")


def write_on_each(world, directory):
    """Every rank is told a file of its own; rank 2 has no rows."""
    count = 2 - world.rank
    ones = torch.ones(count, dtype=torch.int64)
    names = ("sample_index", "finish", "response_lengths", "rewards")
    batch = from_rows(
        [[1]] * count,
        rows={"prompt_ids": 10 * world.rank + ones.cumsum(0), **dict.fromkeys(names, ones)},
        objects={
            "prompt": [SimpleNamespace(text="What?", answer="4")] * count,
            "response": [f"{world.rank}"] * count,
        },
    )
    evaluator = object.__new__(Evaluator)
    evaluator._set = SimpleNamespace(judged_by="exact")
    evaluator._write(batch, directory / f"{world.rank}.jsonl")


def test_all_samples_come_to_the_first_rank_and_to_no_other(tmp_path):
    run_ranks(write_on_each, 3, tmp_path)
    assert os.listdir(tmp_path) == ["0.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    found = [(row["prompt_id"], row["response"], row["judge"]) for row in rows]
    assert found == [(1, "0", "exact"), (2, "0", "exact"), (11, "1", "exact")]
