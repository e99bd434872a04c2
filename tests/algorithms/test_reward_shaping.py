"""Token rewards, scaling and its running moments."""

import json
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spmdrl.algorithms.kl import kl
from spmdrl.algorithms.reward_shaping import (
    RewardScaler,
    missing_eos_penalty,
    scale_and_clip,
    token_rewards,
)
from spmdrl.algorithms.rewards import kl_in_reward
from spmdrl.algorithms.value_loss import gae

NAN = float("nan")


def test_token_rewards_by_hand():
    # row 0: two turns, steps at 1, 2 and 4; row 1: empty; row 2: no response; row 3: one step
    lengths = torch.tensor([6, 0, 1, 2])
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1]).bool()
    token_kl = torch.tensor([9.0, 1.0, -0.5, NAN, 2.0, 9.0, 9.0, 9.0, 0.0])
    scores = torch.tensor([3.0, 70.0, NAN, -1.0])
    rewards = token_rewards(scores, token_kl, lengths, mask, kl_coef=0.5)
    assert rewards.tolist() == [0, -0.5, 0.25, 0, -1 + 3, 0, 0, 0, -1]
    assert rewards.dtype == torch.float32
    plain = token_rewards(scores, token_kl, lengths, mask, kl_coef=0.0)
    assert plain.tolist() == [0, 0, 0, 0, 3, 0, 0, 0, -1]


def random_rows(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 20, (30,), generator=generator)
    num_tokens = int(lengths.sum())
    mask = torch.rand(num_tokens, generator=generator) < 0.4
    token_kl = torch.randn(num_tokens, generator=generator)
    return torch.randn(30, generator=generator), token_kl, lengths, mask


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_token_rewards_agree_with_a_loop(seed):
    scores, token_kl, lengths, mask = random_rows(seed)
    expected, at = [], 0
    for row, n in enumerate(lengths.tolist()):
        steps = [i for i in range(at, at + n) if mask[i]]
        for i in range(at, at + n):
            reward = -0.3 * float(token_kl[i]) if i in steps else 0.0
            if steps and i == steps[-1]:
                reward += float(scores[row])
            expected.append(reward)
        at += n
    got = token_rewards(scores, token_kl, lengths, mask, kl_coef=0.3)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_undiscounted_return_is_the_reward_with_kl_of_the_response():
    scores, token_kl, lengths, mask = random_rows(3)
    rewards = token_rewards(scores, token_kl, lengths, mask, kl_coef=0.3)
    _, returns = gae(rewards, torch.zeros_like(rewards), lengths, mask, gamma=1.0, lam=1.0)
    whole = kl_in_reward(scores, token_kl, mask, lengths, coefficient=0.3)
    num_checked = 0
    for row, (steps, found) in enumerate(
        zip(mask.split(lengths.tolist()), returns.split(lengths.tolist()), strict=True)
    ):
        if steps.any():
            assert found[steps][0].item() == pytest.approx(whole[row].item(), abs=1e-5)
            num_checked += 1
    assert num_checked > 10


def test_rows_of_two_calls_are_the_rows_of_one():
    scores, token_kl, lengths, mask = random_rows(4)
    cut = int(lengths[:11].sum())
    parts = [
        token_rewards(scores[:11], token_kl[:cut], lengths[:11], mask[:cut], kl_coef=0.1),
        token_rewards(scores[11:], token_kl[cut:], lengths[11:], mask[cut:], kl_coef=0.1),
    ]
    whole = token_rewards(scores, token_kl, lengths, mask, kl_coef=0.1)
    assert torch.equal(torch.cat(parts), whole)


def test_token_rewards_check_their_input():
    scores, token_kl, lengths, mask = random_rows(5)
    with pytest.raises(ValueError, match=r"kl_coef=-0\.1"):
        token_rewards(scores, token_kl, lengths, mask, kl_coef=-0.1)
    with pytest.raises(ValueError, match="token_kl has the shape"):
        token_rewards(scores, token_kl[1:], lengths, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="scores"):
        token_rewards(scores[1:], token_kl, lengths, mask, kl_coef=0.1)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_extreme_log_ratios_give_finite_advantages(estimator):
    token_kl = kl(torch.tensor([-1e4, 0.0, -3.0]), torch.tensor([0.0, -1e4, -3.0]), estimator)
    lengths, mask = torch.tensor([3]), torch.ones(3, dtype=torch.bool)
    rewards = token_rewards(torch.ones(1), token_kl, lengths, mask, kl_coef=0.1)
    advantages, returns = gae(rewards, torch.zeros(3), lengths, mask, gamma=1.0, lam=0.95)
    for column in (rewards, advantages, returns):
        assert torch.isfinite(column).all()
    assert rewards[1] < 0  # a token that the reference all but forbids costs


def test_missing_eos_penalty():
    scores, cut = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, True])
    assert missing_eos_penalty(scores, cut, penalty=1.5).tolist() == [-0.5, 2.0, -4.5]
    assert scores.tolist() == [1.0, 2.0, -3.0]
    with pytest.raises(ValueError, match=r"algorithm\.cut_penalty=-1"):
        missing_eos_penalty(scores, cut, penalty=-1.0)


def test_scale_and_clip():
    scores = torch.tensor([-8.0, -1.0, 0.0, 3.0, 9.0])
    assert scale_and_clip(scores, scale=0.5, clip=2.0).tolist() == [-2.0, -0.5, 0.0, 1.5, 2.0]
    assert scale_and_clip(scores, scale=2.0, clip=None).tolist() == [-16.0, -2.0, 0.0, 6.0, 18.0]
    assert scale_and_clip(scores.bfloat16(), scale=1.0, clip=1.0).dtype == torch.float32
    for bad in ({"scale": 0.0, "clip": 1.0}, {"scale": 1.0, "clip": -1.0}):
        with pytest.raises(ValueError, match=r"reward (scale=0|clip=-1)"):
            scale_and_clip(scores, **bad)


def test_scaler_by_hand():
    # 1, 3 have mean 2, std 1; with 8 (and nothing) the three have mean 4, variance (9+1+16)/3
    scaler = RewardScaler().updated(2.0, 2.0, 1.0)
    assert scaler == RewardScaler(count=2.0, mean=2.0, std=1.0)
    scaler = scaler.updated(1.0, 8.0, 0.0).updated(0.0, 0.0, 0.0)
    assert (scaler.count, scaler.mean) == (3.0, 4.0)
    assert scaler.std == pytest.approx((26 / 3) ** 0.5, rel=1e-15)
    assert scaler.scale == pytest.approx((3 / 26) ** 0.5, rel=1e-15)


def moments(scores: list[float]) -> tuple[float, float, float]:
    if not scores:
        return 0.0, 0.0, 0.0
    return float(len(scores)), statistics.fmean(scores), statistics.pstdev(scores)


@settings(deadline=None, max_examples=60)
@given(
    batches=st.lists(st.lists(st.floats(-100, 100), max_size=8), max_size=6),
    offset=st.sampled_from([0.0, 1e5]),
)
def test_scaler_has_the_moments_of_all_scores(batches, offset):
    batches = [[x + offset for x in batch] for batch in batches]
    scaler = RewardScaler()
    for batch in batches:
        scaler = scaler.updated(*moments(batch))
    count, mean, std = moments([x for batch in batches for x in batch])
    assert scaler.count == count
    assert scaler.mean == pytest.approx(mean, rel=1e-12, abs=1e-10)
    assert scaler.std == pytest.approx(std, rel=1e-6, abs=1e-9)


def test_equal_scores_are_not_blown_up():
    scaler = RewardScaler()
    assert scaler.scale == 1.0
    for _ in range(5):
        # what a two-pass variance in float64 leaves of 0.1, 0.1, 0.1
        scaler = scaler.updated(3.0, 0.1, 1.4e-17)
    assert scaler.std > 0 and scaler.scale == 1.0


def test_scaler_state_goes_through_a_checkpoint():
    scaler = RewardScaler().updated(3.0, 0.1, 0.7).updated(5.0, 1 / 3, 0.2)
    assert RewardScaler.from_state(json.loads(json.dumps(scaler.state()))) == scaler
    with pytest.raises(ValueError, match=r"\['count', 'mean'\]"):
        RewardScaler.from_state({"count": 1.0, "mean": 0.0})


@pytest.mark.parametrize("bad", [(-1.0, 0.0, 1.0), (1.0, NAN, 1.0), (1.0, 0.0, -1.0)])
def test_bad_moments_are_refused(bad):
    with pytest.raises(ValueError, match="RewardScaler"):
        RewardScaler().updated(*bad)
