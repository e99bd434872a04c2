"""KL estimators against Schulman's formulas, exact expectations and exact gradients."""

import math

import pytest
import torch

from spmdrl.algorithms.kl import kl, kl_penalty, probability_ratio


def test_worked_by_hand():
    p, q = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl(p, q, "k1").item() == pytest.approx(math.log(2))
    assert kl(p, q, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl(p, q, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_agrees_with_float64(estimator):
    generator = torch.Generator().manual_seed(0)
    p = -3 * torch.rand(1000, generator=generator)
    q = -3 * torch.rand(1000, generator=generator)
    d = (p.double() - q.double()).tolist()
    expected = {
        "k1": d,
        "k2": [x * x / 2 for x in d],
        "k3": [math.exp(-x) - 1 + x for x in d],
    }[estimator]
    torch.testing.assert_close(
        kl(p, q, estimator).double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )


def test_k1_and_k3_are_unbiased_and_k3_never_negative():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    q = torch.tensor([0.4, 0.1, 0.25, 0.25], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl(p.log(), q.log(), estimator)).sum(), exact)
    assert (kl(p.log(), q.log(), "k3") >= 0).all()
    assert (kl(p.log(), q.log(), "k1") < 0).any()


@pytest.mark.parametrize(("estimator", "exact"), [("k1", True), ("k2", True), ("k3", False)])
def test_expected_gradient_of_the_penalty(estimator, exact):
    """Over all tokens, k1's and k2's penalty have the gradient of KL(p || ref) itself.

    k3's has that of KL(ref || p), as is known (its importance weight is not differentiated).
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    penalty = (logprobs.exp().detach() * kl_penalty(logprobs, ref, estimator)).sum()
    (gradient,) = torch.autograd.grad(penalty, logits, retain_graph=True)
    forward = (logprobs.exp() * (logprobs - ref)).sum()
    backward = (ref.exp() * (ref - logprobs)).sum()
    (expected,) = torch.autograd.grad(forward if exact else backward, logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalty_has_the_estimators_value_and_pulls_towards_the_reference(estimator):
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    ref = torch.tensor([-2.0, -1.0])
    penalty = kl_penalty(logprobs, ref, estimator)
    torch.testing.assert_close(penalty, kl(logprobs, ref, estimator))
    (gradient,) = torch.autograd.grad(penalty.sum(), logprobs)
    assert gradient[0] > 0 > gradient[1]  # descent lowers the first logprob, raises the second


def test_extreme_gaps_stay_finite_and_never_push_the_wrong_way():
    logprobs = torch.tensor([-200.0, 0.0], requires_grad=True)
    ref = torch.tensor([0.0, -200.0])
    values = kl(logprobs, ref, "k3")
    assert torch.isfinite(values).all()
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert gradient.tolist() == [0.0, 1.0]
    ratio = probability_ratio(logprobs.detach(), ref)
    torch.testing.assert_close(ratio, torch.tensor([-20.0, 20.0]).exp())


def test_half_precision_is_computed_in_float32():
    p = torch.tensor([-1.0], dtype=torch.bfloat16)
    assert kl(p, p, "k3").dtype == torch.float32
    assert probability_ratio(p, p).dtype == torch.float32


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"'k4'.*k1"):
        kl(torch.zeros(1), torch.zeros(1), "k4")
