"""Reward shaping by hand."""

import pytest
import torch

from spmdrl.algorithms.rewards import has_signal, kl_in_reward, overlong_penalty
from spmdrl.batch import group_index


def test_overlong_penalty_is_dapo_equation_13():
    lengths = torch.tensor([0, 60, 61, 80, 99, 100, 140])
    penalty = overlong_penalty(lengths, max_tokens=100, buffer=40)
    torch.testing.assert_close(
        penalty, torch.tensor([0.0, 0.0, -1 / 40, -0.5, -39 / 40, -1.0, -1.0])
    )
    torch.testing.assert_close(
        overlong_penalty(lengths, max_tokens=100, buffer=40, factor=0.5), penalty / 2
    )


@pytest.mark.parametrize(
    ("buffer", "factor", "named"), [(0, 1.0, "buffer=0"), (101, 1.0, "101"), (5, -1.0, "factor")]
)
def test_overlong_settings_are_checked(buffer, factor, named):
    with pytest.raises(ValueError, match=named):
        overlong_penalty(torch.tensor([3]), max_tokens=100, buffer=buffer, factor=factor)


def test_kl_in_reward_counts_response_tokens_only():
    rewards = torch.tensor([1.0, 2.0, 3.0])
    token_kl = torch.tensor([9.0, 0.1, 0.2, 9.0, -0.5])
    mask = torch.tensor([False, True, True, False, True])
    shaped = kl_in_reward(rewards, token_kl, mask, torch.tensor([3, 0, 2]), coefficient=0.5)
    torch.testing.assert_close(shaped, torch.tensor([0.85, 2.0, 3.25]))
    assert shaped.dtype == torch.float32


def test_signal_by_group_in_order_of_appearance():
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.0])
    prompts = torch.tensor([9, 2, 9, 2, 5, 9])
    assert has_signal(rewards, prompts).tolist() == [False, False, False]
    rewards[5] = 1.0
    signal = has_signal(rewards, prompts)
    assert signal.tolist() == [True, False, False]
    kept = signal[group_index(prompts)[0]]
    assert kept.tolist() == [True, False, True, False, False, True]
    assert has_signal(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
