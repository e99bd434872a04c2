"""Group advantages against hand-worked groups and Python's own statistics."""

import statistics

import pytest
import torch

from spmdrl.algorithms.advantages import (
    broadcast_to_tokens,
    group_advantages,
    leave_one_out,
    rewards_to_go,
)


def test_worked_by_hand():
    rewards = torch.tensor([1.0, 5.0, 0.0, 3.0, 0.0])
    prompts = torch.tensor([7, 3, 7, 3, 7])  # groups (1, 0, 0) and (5, 3), interleaved
    plain = group_advantages(rewards, prompts, std=False)
    torch.testing.assert_close(plain, torch.tensor([2 / 3, 1.0, -1 / 3, -1.0, -1 / 3]))
    deviations = torch.tensor([3**-0.5, 2**0.5, 3**-0.5, 2**0.5, 3**-0.5])
    scaled = group_advantages(rewards, prompts, std=True, eps=0.0)
    torch.testing.assert_close(scaled, plain / deviations)
    others = leave_one_out(rewards, prompts)
    torch.testing.assert_close(others, torch.tensor([1.0, 2.0, -0.5, -2.0, -0.5]))
    assert plain.dtype == scaled.dtype == others.dtype == torch.float32


def random_groups(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 9, (60,), generator=generator) * 1000 + 5
    return torch.randn(60, generator=generator), prompts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_an_independent_reference(seed):
    rewards, prompts = random_groups(seed)
    eps = 1e-4
    plain, scaled, others = [], [], []
    for i, prompt in enumerate(prompts.tolist()):
        rows = [j for j, p in enumerate(prompts.tolist()) if p == prompt]
        group = [float(rewards[j]) for j in rows]
        rest = [float(rewards[j]) for j in rows if j != i]
        centred = float(rewards[i]) - statistics.fmean(group)
        deviation = statistics.stdev(group) if rest else 0.0
        plain.append(centred)
        scaled.append(centred / (deviation + eps))
        others.append(float(rewards[i]) - statistics.fmean(rest) if rest else 0.0)
    for got, expected in (
        (group_advantages(rewards, prompts, std=False), plain),
        (group_advantages(rewards, prompts, std=True, eps=eps), scaled),
        (leave_one_out(rewards, prompts), others),
    ):
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_row_order_does_not_matter():
    rewards, prompts = random_groups(3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    for compute in (
        leave_one_out,
        lambda r, p: group_advantages(r, p, std=True),
        lambda r, p: group_advantages(r, p, std=False),
    ):
        straight, shuffled = compute(rewards, prompts), compute(rewards[order], prompts[order])
        torch.testing.assert_close(shuffled, straight[order], rtol=1e-6, atol=1e-7)


def test_groups_without_signal_are_exactly_zero():
    # three times 0.1 has a rounded mean that is not 0.1
    rewards = torch.tensor([0.1, 0.1, 0.1, 4.0, -1e30])
    prompts = torch.tensor([0, 0, 0, 1, 2])
    for advantages in (
        group_advantages(rewards, prompts, std=True, eps=0.0),
        group_advantages(rewards, prompts, std=False),
        leave_one_out(rewards, prompts),
    ):
        assert advantages.tolist() == [0.0] * 5


def test_empty_and_bad_input():
    nothing = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert group_advantages(*nothing, std=True).shape == (0,)
    assert leave_one_out(*nothing).shape == (0,)
    prompts = torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"rows \[1\] are not finite"):
        group_advantages(torch.tensor([0.0, float("nan")]), prompts, std=False)
    with pytest.raises(ValueError, match="prompt_ids"):
        leave_one_out(torch.zeros(3), prompts)


def test_broadcast():
    values, lengths = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2, 0, 3])
    assert broadcast_to_tokens(values, lengths).tolist() == [1, 1, 3, 3, 3]
    mask = torch.tensor([False, True, False, True, True])
    assert broadcast_to_tokens(values, lengths, mask).tolist() == [0, 1, 0, 3, 3]


def test_rewards_to_go_by_hand():
    lengths = torch.tensor([4, 2, 1])
    mask = torch.tensor([0, 1, 1, 1, 0, 1, 0]).bool()  # the last row has no response
    token_kl = torch.tensor([9.0, 0.1, 0.2, 0.4, 9.0, 0.5, 9.0])
    found = rewards_to_go(torch.tensor([1.0, -2.0, 7.0]), token_kl, lengths, mask, kl_coef=0.5)
    expected = [0, 1 - 0.35, 1 - 0.3, 1 - 0.2, 0, -2 - 0.25, 0]
    assert found.tolist() == pytest.approx(expected)
    plain = rewards_to_go(torch.tensor([1.0, -2.0, 7.0]), token_kl, lengths, mask, kl_coef=0.0)
    assert plain.tolist() == [0, 1, 1, 1, 0, -2, 0]
