"""GAE by hand, against the paper's average of k-step advantages, and its closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spmdrl.algorithms.value_loss import gae

NAN = float("nan")


def test_worked_by_hand():
    # Row 0 has three steps with one token between them; row 1 has none; row 2 has one.
    # gamma = lam = 1/2. Row 0: r = 1, 1, 4 and V = 1/2, 1, 2, so
    #   delta = 1 + 1/2 - 1/2, 1 + 1 - 1, 4 - 2 = 1, 1, 2
    #   A_3 = 2, A_2 = 1 + 2/4 = 3/2, A_1 = 1 + 1/4 + 2/16 = 11/8; R = 15/8, 5/2, 4
    # Row 2: r = -1, V = 3: A = -4, R = -1.
    lengths = torch.tensor([6, 1, 2])
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1]).bool()
    rewards = torch.tensor([NAN, 1.0, 1.0, 70.0, 4.0, 70.0, 70.0, NAN, -1.0])
    values = torch.tensor([50.0, 0.5, 1.0, NAN, 2.0, 50.0, NAN, 50.0, 3.0], requires_grad=True)
    advantages, returns = gae(rewards, values, lengths, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0, 1.375, 1.5, 0, 2, 0, 0, 0, -4]
    assert returns.tolist() == [0, 1.875, 2.5, 0, 4, 0, 0, 0, -1]
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad and not returns.requires_grad


def reference(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The lambda-weighted average of the k-step advantages of one episode (eq. 11 to 16).

    A^(k)_t = r_t + ... + gamma^(k-1) r_{t+k-1} + gamma^k V_{t+k} - V_t. Beyond the end of the
    episode all A^(k) are equal, and their weights (1 - lam) lam^(k-1) add up to lam^(n-1).
    """
    result = []
    for t in range(len(rewards)):
        ahead = len(rewards) - t
        steps = []
        for k in range(1, ahead + 1):
            seen = sum(gamma**i * rewards[t + i] for i in range(k))
            rest = gamma**k * values[t + k] if k < ahead else 0.0
            steps.append(seen + rest - values[t])
        average = sum((1 - lam) * lam**k * step for k, step in enumerate(steps[:-1]))
        result.append(average + lam ** (ahead - 1) * steps[-1])
    return result


def random_columns(masks: list[list[bool]], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards, values, lengths and loss_mask of rows with these masks."""
    lengths = torch.tensor([len(mask) for mask in masks], dtype=torch.int64)
    mask = torch.tensor([flag for row in masks for flag in row], dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(mask), generator=generator)
    return rewards, values, lengths, mask


@settings(deadline=None, max_examples=60)
@given(
    masks=st.lists(st.lists(st.booleans(), max_size=12), max_size=5),
    seed=st.integers(0, 1000),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_agrees_with_the_papers_average(masks, seed, gamma, lam):
    rewards, values, lengths, mask = random_columns(masks, seed)
    advantages, returns = gae(rewards, values, lengths, mask, gamma=gamma, lam=lam)
    expected = torch.zeros(len(mask), dtype=torch.float64)
    start = 0
    for row in masks:
        steps = [start + i for i, flag in enumerate(row) if flag]
        episode = [float(rewards[i]) for i in steps], [float(values[i]) for i in steps]
        expected[steps] = torch.tensor(reference(*episode, gamma, lam), dtype=torch.float64)
        start += len(row)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-6)
    expected_returns = torch.where(mask, expected + values.double(), 0.0)
    torch.testing.assert_close(returns.double(), expected_returns, rtol=1e-6, atol=1e-6)


def test_closed_forms():
    masks = [[False] + [i % 4 != 3 for i in range(n)] for n in (40, 1, 7)]
    rewards, values, lengths, mask = random_columns(masks, 3)
    _, to_go = gae(rewards, values, lengths, mask, gamma=1.0, lam=1.0)
    advantages, one_step = gae(rewards, values, lengths, mask, gamma=0.9, lam=0.0)
    _, bandit = gae(rewards, values, lengths, mask, gamma=0.0, lam=0.7)
    start = 0
    for row in masks:
        steps = [start + i for i, flag in enumerate(row) if flag]
        r, v = rewards[steps].double(), values[steps].double()
        # lam = gamma = 1: returns are the rewards to go, whatever the values are
        torch.testing.assert_close(to_go[steps].double(), r.flip(0).cumsum(0).flip(0))
        # lam = 0: the TD error
        target = r + 0.9 * torch.cat([v[1:], torch.zeros(1, dtype=torch.float64)])
        torch.testing.assert_close(advantages[steps].double(), target - v)
        torch.testing.assert_close(one_step[steps].double(), target)
        # gamma = 0: the reward
        torch.testing.assert_close(bandit[steps].double(), r)
        start += len(row)


def test_values_that_know_the_returns_leave_no_advantage():
    rewards, _, lengths, mask = random_columns([[True] * 9, [True] * 30], 5)
    _, returns = gae(rewards, torch.zeros(39), lengths, mask, gamma=0.97, lam=1.0)
    advantages, again = gae(rewards, returns, lengths, mask, gamma=0.97, lam=0.6)
    torch.testing.assert_close(advantages, torch.zeros(39), rtol=0, atol=1e-6)
    torch.testing.assert_close(again, returns, rtol=1e-6, atol=1e-6)


def test_other_rows_of_the_call_do_not_matter():
    masks = [[True] * 33, [False, True] * 20, [], [False], [True] * 64, [True]]
    rewards, values, lengths, mask = random_columns(masks, 6)
    whole = gae(rewards, values, lengths, mask, gamma=0.99, lam=0.95)
    cut = 33 + 40  # the tokens of the first two rows
    parts = [
        gae(rewards[rows], values[rows], n, mask[rows], gamma=0.99, lam=0.95)
        for rows, n in ((slice(0, cut), lengths[:2]), (slice(cut, None), lengths[2:]))
    ]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


def test_a_row_of_a_hundred_thousand_tokens_agrees_with_the_recursion():
    rewards, values, lengths, mask = random_columns([[True] * 100_000], 7)
    advantages, _ = gae(rewards, values, lengths, mask, gamma=1.0, lam=0.999)
    expected, ahead, next_value = [], 0.0, 0.0
    for r, v in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        ahead = r + next_value - v + 0.999 * ahead
        next_value = v
        expected.append(ahead)
    exact = torch.tensor(expected[::-1], dtype=torch.float64)
    torch.testing.assert_close(advantages.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"gamma": 1.1, "lam": 1.0}, "gamma=1.1"),
        ({"gamma": 1.0, "lam": -0.1}, "lam=-0.1"),
        ({"gamma": NAN, "lam": 1.0}, "gamma=nan"),
    ],
)
def test_settings_are_checked(settings_, named):
    columns = random_columns([[True]], 0)
    with pytest.raises(ValueError, match=named):
        gae(*columns, **settings_)


def test_bad_columns_are_named():
    rewards, values, lengths, mask = random_columns([[True, True], [True]], 0)
    with pytest.raises(ValueError, match="values has the shape"):
        gae(rewards, values[:2], lengths, mask, gamma=1.0, lam=1.0)
    values[2] = NAN
    with pytest.raises(ValueError, match=r"values of rows \[1\] are not finite"):
        gae(rewards, values, lengths, mask, gamma=1.0, lam=1.0)
    rewards[0] = float("inf")
    with pytest.raises(ValueError, match=r"rewards of rows \[0\] are not finite"):
        gae(rewards, values, lengths, mask, gamma=1.0, lam=1.0)
