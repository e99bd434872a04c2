"""The next-token loss by hand and against cross entropy."""

import math

import pytest
import torch

from spmdrl.algorithms.metrics import combine
from spmdrl.algorithms.policy_loss import loss_shares, loss_weights
from spmdrl.algorithms.supervised import next_token_loss


def test_worked_by_hand():
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss, sums = next_token_loss(logprobs, torch.tensor([1.0, 0.5, 0.0]))
    assert loss.item() == 1.0 + 0.5 * 2.0
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [-1.0, -0.5, 0.0]  # descent raises them
    assert {name: value.item() for name, value in sums.items()} == {"tokens": 2.0, "nll": 3.0}


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean"])
def test_agrees_with_a_float64_loop_over_rows(mode):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 1, 9, 4])
    logits = torch.randn(19, 11, generator=generator)
    targets = torch.randint(0, 11, (19,), generator=generator)
    mask = torch.rand(19, generator=generator) < 0.7
    mask[5] = True  # each row has a loss token
    weights = loss_weights(lengths, mask, mode, max_tokens=9)
    loss, sums = next_token_loss(logits.log_softmax(1)[range(19), targets], weights)
    rows, at = [], 0
    for n in lengths.tolist():
        rows.append(
            [
                math.log(sum(math.exp(float(z)) for z in logits[i])) - float(logits[i, targets[i]])
                for i in range(at, at + n)
                if mask[i]
            ]
        )
        at += n
    shares = loss_shares(lengths, mask, mode).sum().item()
    flat = [x for row in rows for x in row]
    expected = {
        "token_mean": sum(flat) / len(flat),
        "sequence_mean": sum(sum(row) / len(row) for row in rows) / len(rows),
    }[mode]
    assert loss.item() / shares == pytest.approx(expected, rel=1e-6)
    assert sums["nll"].item() == pytest.approx(sum(flat), rel=1e-6)
    assert sums["tokens"] == len(flat)


def test_gradient_and_cuts():
    generator = torch.Generator().manual_seed(1)
    logprobs = -3 * torch.rand(50, generator=generator, dtype=torch.float64)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)
    weights[::7] = 0

    def loss_of(logprobs: torch.Tensor) -> torch.Tensor:
        return next_token_loss(logprobs, weights)[0]

    assert torch.autograd.gradcheck(loss_of, (logprobs.clone().requires_grad_(),))
    whole, whole_sums = next_token_loss(logprobs, weights)
    parts = [
        next_token_loss(logprobs[i], weights[i])
        for i in (slice(0, 0), slice(0, 20), slice(20, None))
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-12)
    combined = combine([{n: v.item() for n, v in sums.items()} for _, sums in parts])
    assert combined == pytest.approx({n: v.item() for n, v in whole_sums.items()}, rel=1e-12)


def test_half_precision_and_improbable_tokens():
    logprobs = torch.tensor([-1e4, -0.5], dtype=torch.bfloat16)
    loss, sums = next_token_loss(logprobs, torch.ones(2))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert sums["nll"].dtype == torch.float64 and torch.isfinite(sums["nll"])
