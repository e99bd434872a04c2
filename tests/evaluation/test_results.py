"""Result files are whole or not there."""

import json
import os

import pytest

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
