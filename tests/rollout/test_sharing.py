"""Rows that hold the same pages: how the attention kernel is told of them."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_models import request

from spmdrl.rollout.native.sharing import alone, find_sharing, may_share

BLOCK = 4


def found(tables: list[list[int]], lengths: list[int], prompts: list[int]) -> list[list[int]]:
    """Return [rows, first places, keys shared with the row before, most keys shared]."""
    width = max(map(len, tables), default=0) + 1
    table = np.zeros((len(tables), width), np.int32)
    for row, blocks in enumerate(tables):
        table[row, : len(blocks)] = blocks
    return find_sharing(table, np.array(lengths), np.array(prompts), BLOCK).tolist()


def test_two_prompts_whose_rows_are_mixed() -> None:
    tables = [[5, 6, 1], [2, 7], [5, 6, 3], [2, 8], [9]]
    assert found(tables, [9, 5, 10, 6, 1], [0, 1, 0, 1, 2]) == [
        [1, 3, 0, 2, 4],
        [0, 0, 2, 2, 4],
        [0, 4, 0, 8, 0],
        [4, 4, 8, 8, 0],
    ]


def test_a_page_that_some_row_has_not_filled_is_not_shared() -> None:
    tables = [[5, 6], [5, 6]]
    assert found(tables, [7, 8], [0, 0])[2] == [0, 4]
    assert found(tables, [8, 8], [0, 0])[2] == [0, 8]
    assert found(tables, [3, 8], [0, 0])[2] == [0, 0]


def test_groups_with_the_same_first_page_are_groups_of_their_own() -> None:
    tables = [[1, 2, 10], [1, 2, 11], [1, 3, 12], [1, 3, 13], [1, 14], [1, 15]]
    _, begins, keys, most = found(tables, [9, 9, 9, 9, 5, 5], [0, 0, 1, 1, 2, 3])
    assert begins == [0, 0, 2, 2, 4, 4]
    assert keys == [0, 8, 0, 8, 0, 4] and most == [8, 8, 8, 8, 4, 4]


def test_rows_with_the_same_first_page_alone_are_one_group() -> None:
    assert found([[1, 2], [1, 3], [1, 4]], [5, 6, 7], [0, 1, 2])[1:] == [
        [0] * 3,
        [0, 4, 4],
        [4] * 3,
    ]


def test_rows_that_share_nothing() -> None:
    assert found([], [], []) == [[], [], [], []]
    assert found([[1], [2], [3]], [4, 4, 4], [0, 1, 2]) == alone(3).tolist()


@pytest.mark.parametrize(
    "lengths, samples, prefix, shares",
    [
        ([8, 3], [2, 1], 0, True),
        ([7, 3], [2, 1], 0, False),  # its second page is not full
        ([8, 9], [1, 1], 0, False),
        ([8, 9], [1, 1], 8, True),
    ],
)
def test_calls_that_share(
    lengths: list[int], samples: list[int], prefix: int, shares: bool
) -> None:
    requests = [
        request(tuple(range(n)), i, k)
        for i, (n, k) in enumerate(zip(lengths, samples, strict=True))
    ]
    assert may_share(requests, prefix, BLOCK, 8) is shares
