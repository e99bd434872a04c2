"""`Batch`: small cases by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spmdrl.batch import Batch, concat, from_rows, group_index


def example() -> Batch:
    return Batch(
        lengths=torch.tensor([2, 0, 3]),
        tokens={"tokens": torch.tensor([1, 2, 3, 4, 5])},
        rows={"reward": torch.tensor([0.5, 1.5, 2.5]), "wide": torch.arange(6).reshape(3, 2)},
        objects={"answer": ["a", "b", "c"]},
    )


def test_counts_offsets_and_row_of_token() -> None:
    batch = example()
    assert (len(batch), batch.num_rows, batch.num_tokens) == (3, 3, 5)
    assert batch.offsets().tolist() == [0, 2, 2, 5]
    assert batch.row_of_token().tolist() == [0, 0, 2, 2, 2]
    assert batch.columns() == ["answer", "reward", "tokens", "wide"]
    assert "answer" in batch
    assert "missing" not in batch


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([3.0, 0.0, 12.0])),
        (torch.tensor([True, True, True, False, False]), torch.tensor([2, 0, 1])),
    ],
)
def test_row_sum_keeps_the_dtype_and_counts_bools(
    column: torch.Tensor, expected: torch.Tensor
) -> None:
    result = example().row_sum(column)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


def test_select_reorders_and_repeats_whole_rows() -> None:
    picked = example().select([2, 1, 2, 0])
    assert picked.lengths.tolist() == [3, 0, 3, 2]
    assert picked["tokens"].tolist() == [3, 4, 5, 3, 4, 5, 1, 2]
    assert picked["reward"].tolist() == [2.5, 1.5, 2.5, 0.5]
    assert picked["wide"].tolist() == [[4, 5], [2, 3], [4, 5], [0, 1]]
    assert picked.objects["answer"] == ["c", "b", "c", "a"]


def test_select_of_nothing_keeps_the_columns() -> None:
    empty = example().select([])
    assert (empty.num_rows, empty.num_tokens) == (0, 0)
    assert empty.columns() == example().columns()
    assert empty["wide"].shape == (0, 2)


def test_split_rows_and_concat_are_inverse() -> None:
    batch = example()
    again = concat(list(batch.split_rows()))
    assert torch.equal(again.lengths, batch.lengths)
    assert all(torch.equal(again[n], batch[n]) for n in ("tokens", "reward", "wide"))
    assert again.objects == batch.objects


def test_concat_refuses_columns_of_another_name_or_kind() -> None:
    a = from_rows([[1]], rows={"x": torch.zeros(1)})
    b = Batch(lengths=a.lengths, tokens={"tokens": a["tokens"], "x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"columns differ.*'x'"):
        concat([a, b])
    with pytest.raises(ValueError, match="at least one"):
        concat([])


def test_merge_takes_the_other_columns_and_refuses_other_rows() -> None:
    batch = example()
    other = Batch(lengths=batch.lengths, rows={"reward": torch.ones(3), "new": torch.zeros(3)})
    merged = batch | other
    assert merged["reward"].tolist() == [1, 1, 1]
    assert "new" in merged
    assert "tokens" in merged
    with pytest.raises(ValueError, match="lengths differ"):
        batch | from_rows([[1], [2], [3, 4]])


def test_keep_names_the_missing_column() -> None:
    assert example().keep(["reward", "answer"]).columns() == ["answer", "reward"]
    with pytest.raises(ValueError, match=r"no column 'absent'.*'reward'"):
        example().keep(["reward", "absent"])
    with pytest.raises(ValueError, match=r"no tensor column 'absent'.*'reward'"):
        example()["absent"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": {"x": torch.zeros(4)}}, r"token column 'x'.*\(4,\).*3 tokens"),
        ({"tokens": {"x": torch.tensor(1.0)}}, r"token column 'x'.*\(\)"),
        ({"rows": {"x": torch.zeros(3)}}, r"row column 'x'.*\(3,\).*2 rows"),
        (
            {"objects": {"x": ["a"]}},
            "Python column 'x' has the shape .1,., but the batch has 2 rows",
        ),
        ({"rows": {"x": torch.zeros(2)}, "objects": {"x": [0, 0]}}, "two kinds.*'x'"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "int64.*float32"),
        ({"lengths": torch.tensor([4, -1])}, "negative"),
    ],
)
def test_a_bad_column_is_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch(**{"lengths": torch.tensor([1, 2]), **columns})


def test_group_index_counts_in_order_of_appearance() -> None:
    index, count = group_index(torch.tensor([7, 3, 7, 9, 3]))
    assert index.tolist() == [0, 1, 0, 2, 1]
    assert count == 3
