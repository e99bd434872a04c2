"""Whitening by given moments."""

import statistics

import pytest
import torch

from spmdrl.algorithms.advantages import whiten


def test_worked_by_hand():
    # mean 3, std 2: (7 - 3) / 2 = 2, (3 - 3) / 2 = 0, (2 - 3) / 2 = -1/2
    values = torch.tensor([7.0, 3.0, 2.0])
    shifted = whiten(values, 3.0, 2.0, shift_mean=True, eps=0.0)
    assert shifted.tolist() == [2.0, 0.0, -0.5] and shifted.dtype == torch.float32
    kept = whiten(values, 3.0, 2.0, shift_mean=False, eps=0.0)
    assert kept.tolist() == [5.0, 3.0, 2.5]
    # eps is inside the root: sqrt(3^2 + 16) = 5
    assert whiten(torch.tensor([11.0]), 1.0, 3.0, shift_mean=True, eps=16.0).tolist() == [2.0]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_agrees_with_a_float64_loop(shift_mean):
    values = 50 + 3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    numbers = values.tolist()
    mean, std = statistics.fmean(numbers), statistics.pstdev(numbers)
    got = whiten(values, mean, std, shift_mean=shift_mean)
    add = 0.0 if shift_mean else mean
    expected = [(x - mean) * (std**2 + 1e-8) ** -0.5 + add for x in numbers]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert statistics.fmean(got.tolist()) == pytest.approx(add, abs=1e-5)
    assert statistics.pstdev(got.tolist()) == pytest.approx(1.0, rel=1e-5)


def test_moments_are_the_callers():
    values = torch.tensor([1.0, 2.0, 6.0])
    parts = [whiten(part, 3.0, 2.0, shift_mean=True) for part in (values[:1], values[1:])]
    assert torch.equal(torch.cat(parts), whiten(values, 3.0, 2.0, shift_mean=True))


def test_no_spread_and_half_precision():
    assert whiten(torch.tensor([4.0, 4.0]), 4.0, 0.0, shift_mean=True).tolist() == [0.0, 0.0]
    assert whiten(torch.ones(1).bfloat16(), 0.0, 1.0, shift_mean=True).dtype == torch.float32
    assert whiten(torch.ones(1).double(), 0.0, 1.0, shift_mean=True).dtype == torch.float64


@pytest.mark.parametrize(("mean", "std"), [(0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_bad_moments_are_named(mean, std):
    with pytest.raises(ValueError, match=f"mean={mean}, std={std}"):
        whiten(torch.zeros(1), mean, std, shift_mean=True)
