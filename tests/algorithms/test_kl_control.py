"""KL per response, and the coefficients that answer to it."""

import json
import random

import pytest
import torch

from spmdrl.algorithms.kl import AdaptiveKl, FixedKl, sequence_kl


def test_sequence_kl_by_hand():
    # row 0: 0.5 - 0.25; row 1 is empty; row 2: 2; row 3 has no response token
    token_kl = torch.tensor([9.0, 0.5, -0.25, 2.0, float("nan"), 9.0])
    mask = torch.tensor([0, 1, 1, 1, 0, 0]).bool()
    kl = sequence_kl(token_kl, torch.tensor([3, 0, 2, 1]), mask)
    assert kl.tolist() == [0.25, 0.0, 2.0, 0.0] and kl.dtype == torch.float32
    with pytest.raises(ValueError, match="token_kl has the shape"):
        sequence_kl(token_kl[:5], torch.tensor([3, 0, 2, 1]), mask)


def test_sequence_kl_agrees_with_a_loop():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 30, (20,), generator=generator)
    token_kl = torch.randn(int(lengths.sum()), generator=generator)
    mask = torch.rand(len(token_kl), generator=generator) < 0.6
    expected, at = [], 0
    for n in lengths.tolist():
        expected.append(sum(float(token_kl[i]) for i in range(at, at + n) if mask[i]))
        at += n
    got = sequence_kl(token_kl, lengths, mask)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kl_mean", "coef"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.202),  # e = 0.1, times 1000 / 10000: 1 % up
        (9.0, 0.204),  # e = 0.5, clipped to 0.2
        (5.4, 0.198),  # e = -0.1
        (0.0, 0.196),  # e = -1, clipped to -0.2
        (-3.0, 0.196),  # an estimate by k1 may be negative
    ],
)
def test_adaptive_by_hand(kl_mean, coef):
    control = AdaptiveKl(coef=0.2, target=6.0, horizon=10_000.0)
    assert control.updated(kl_mean, 1000).coef == pytest.approx(coef, rel=1e-12)
    assert control.coef == 0.2


def test_adaptive_agrees_with_the_papers_recursion():
    draw = random.Random(1)
    control = AdaptiveKl(coef=0.1, target=3.0, horizon=5000.0)
    expected = 0.1
    for _ in range(50):
        kl_mean, n = draw.uniform(-1.0, 8.0), draw.randrange(0, 2000)
        control = control.updated(kl_mean, n)
        error = sorted([-0.2, (kl_mean - 3.0) / 3.0, 0.2])[1]
        expected += expected * error * n / 5000.0
        assert control.coef == pytest.approx(expected, rel=1e-12)
    assert (control.target, control.horizon) == (3.0, 5000.0)


def test_adaptive_finds_the_coefficient_of_its_target():
    # a policy whose KL is 2 / coef has KL 8 at coef 1/4
    control = AdaptiveKl(coef=3.0, target=8.0, horizon=1000.0)
    for _ in range(400):
        control = control.updated(2.0 / control.coef, 500)
    assert control.coef == pytest.approx(0.25, rel=1e-9)


def test_no_samples_change_nothing():
    control = AdaptiveKl(coef=0.2, target=6.0, horizon=100.0)
    assert control.updated(0.0, 0) == control


def test_state_goes_through_a_checkpoint():
    start = AdaptiveKl(coef=0.2, target=6.0, horizon=10_000.0)
    later = start.updated(7.0, 333)
    state = json.loads(json.dumps(later.state()))
    assert start.restored(state) == later != start
    fixed = FixedKl(coef=0.05)
    assert fixed.restored(json.loads(json.dumps(fixed.state()))) == fixed
    assert fixed.updated(100.0, 10) == fixed and fixed.coef == 0.05
    with pytest.raises(ValueError, match="fixed"):
        fixed.restored(later.state())
    with pytest.raises(ValueError, match="coef"):
        start.restored(fixed.state())
    with pytest.raises(ValueError, match=r"coef=-1\.0"):
        start.restored({"coef": -1.0})


@pytest.mark.parametrize("name", ["coef", "target", "horizon"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_adaptive_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"kl {name}={value}"):
        AdaptiveKl(**{"coef": 0.1, "target": 1.0, "horizon": 100.0, name: value})


def test_other_bad_values_are_named():
    assert FixedKl(coef=0.0).coef == 0.0
    with pytest.raises(ValueError, match=r"kl coef=-0\.1"):
        FixedKl(coef=-0.1)
    control = AdaptiveKl(coef=0.1, target=1.0, horizon=100.0)
    with pytest.raises(ValueError, match="nan"):
        control.updated(float("nan"), 10)
    with pytest.raises(ValueError, match="num_samples=-1"):
        control.updated(1.0, -1)
    assert control.updated(0.0, 499).coef > 0
    with pytest.raises(ValueError, match=r"num_samples=500.*horizon=100"):
        control.updated(0.0, 500)
