"""Comparisons of samples: best and worst, all ordered pairs, equal responses once."""

from __future__ import annotations

import pytest
import torch

from spmdrl.algorithms.direct_preference import distinct_responses, ordered_pairs, pair_rows
from spmdrl.batch import from_rows

REWARDS = torch.tensor([1.0, 4.0, 2.0, 4.0, 3.0, 3.0, 0.5, 0.1])
PROMPTS = torch.tensor([7, 7, 7, 7, 2, 2, 9, 9])
ALL = torch.ones(8, dtype=torch.bool)


def test_best_and_worst_by_hand():
    rows, preference = pair_rows(REWARDS, PROMPTS, ALL, "best_worst")
    # of prompt 7 the first 4.0 and the 1.0; prompt 2 is a tie
    assert rows.tolist() == [0, 1, 6, 7] and preference.tolist() == [0, 1, 1, 0]
    better, worse = ordered_pairs(preference, PROMPTS[rows])
    assert sorted(zip(rows[better].tolist(), rows[worse].tolist(), strict=True)) == [(1, 0), (6, 7)]


def test_all_ordered_pairs_by_hand():
    rows, preference = pair_rows(REWARDS, PROMPTS, ALL, "all")
    assert rows.tolist() == [0, 1, 2, 3, 6, 7]
    better, worse = ordered_pairs(preference, PROMPTS[rows])
    found = sorted(zip(rows[better].tolist(), rows[worse].tolist(), strict=True))
    assert found == [(1, 0), (1, 2), (2, 0), (3, 0), (3, 2), (6, 7)]


def test_rows_that_are_not_usable_are_in_no_pair():
    usable = ALL.clone()
    usable[[0, 7]] = False
    rows, preference = pair_rows(REWARDS, PROMPTS, usable, "best_worst")
    assert rows.tolist() == [1, 2] and preference.tolist() == [1, 0]
    none = pair_rows(REWARDS[:0], PROMPTS[:0], ALL[:0], "all")
    assert [len(part) for part in none] == [0, 0]


def test_equal_answers_of_a_prompt_count_once():
    batch = from_rows(
        [[1, 2, 5, 6], [1, 2, 5, 6], [1, 2, 5], [1, 2, 5, 6], [1, 2, 5, 6]],
        rows={
            "prompt_ids": torch.tensor([3, 3, 3, 4, 4]),
            # the last row's answer is [5, 6] to [1, 2], the one before it [2, 5, 6] to [1]
            "prompt_lengths": torch.tensor([2, 2, 2, 1, 2]),
        },
    )
    assert distinct_responses(batch).tolist() == [True, False, True, True, True]


def test_a_reward_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"rows \[1\] are not finite"):
        pair_rows(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]), ALL[:2], "all")
