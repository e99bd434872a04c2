"""Chunked log-probabilities against log_softmax of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness import run_ranks
from spmdrl.distributed.parallel import Parallel
from spmdrl.training import logprobs as module
from spmdrl.training.logprobs import token_logprobs
from spmdrl.world import World


def inputs(
    num_tokens: int = 11, vocab: int = 600, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 8, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, 8, generator=generator, dtype=dtype)
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    grads = torch.randn(2, num_tokens, generator=generator, dtype=dtype)
    return [hidden, weight, targets, grads]


def whole(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    products = hidden @ weight.T
    capped = products if softcap is None else softcap * torch.tanh(products / softcap)
    logits = torch.log_softmax(capped / temperature, -1)
    return logits.gather(1, targets[:, None])[:, 0], -(logits.exp() * logits).sum(-1)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabulary tiles of 256 columns, so that 600 take three."""
    monkeypatch.setattr(module, "CPU_TILE", 1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("chunk", "softcap"), [(1, None), (4, None), (100, None), (4, 3.0)])
@pytest.mark.parametrize("use", ["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_log_softmax(
    temperature: float, chunk: int, softcap: float | None, use: str
) -> None:
    hidden, weight, targets, grads = inputs()
    factors = grads * torch.tensor([[use != "entropy"], [use != "logprobs"]])

    def gradients(found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if use == "logprobs":
            loss = (found[0] * factors[0]).sum()
        elif use == "entropy":
            loss = (found[1] * factors[1]).sum()
        else:
            loss = (torch.stack(found) * factors).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    hidden.requires_grad_(), weight.requires_grad_()
    expected = whole(hidden, weight, targets, temperature, softcap)
    found = token_logprobs(
        *(hidden, weight, targets), temperature=temperature, chunk=chunk, softcap=softcap
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_tiles")
def test_logprobs_do_not_depend_on_whether_the_entropy_is_computed() -> None:
    hidden, weight, targets, grads = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    found = []
    for with_entropy in (True, False):
        logprobs, *more = token_logprobs(
            hidden, weight, targets, temperature=0.6, chunk=4, with_entropy=with_entropy
        )
        assert len(more) == with_entropy
        loss = (logprobs * grads[0]).sum()
        found.append((logprobs, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, targets, _ = inputs(3, 300)
    hidden, weight = hidden[:, :3].clone(), weight[:, :3].clone()
    hidden.requires_grad_(), weight.requires_grad_()

    def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, weight, targets, temperature=0.8, chunk=2, softcap=2.0)

    assert torch.autograd.gradcheck(run, (hidden, weight), fast_mode=True)


def test_large_and_tiny_logits_stay_finite() -> None:
    hidden, weight, targets, _ = inputs(dtype=torch.float32)
    for factor in (1e-4, 300.0):
        found = token_logprobs(hidden * factor, weight, targets, temperature=1.0, chunk=4)
        expected = whole(hidden.double() * factor, weight.double(), targets, 1.0)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=2e-3)


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight, targets, _ = inputs(0)
    hidden.requires_grad_(), weight.requires_grad_()
    found = token_logprobs(hidden, weight, targets, temperature=1.0, chunk=4)
    d_hidden, d_weight = torch.autograd.grad(found[0].sum(), (hidden, weight))
    assert d_hidden.shape == (0, 8) and not d_weight.any()


def test_bfloat16_weights_give_float32_results_near_the_exact_ones() -> None:
    hidden, weight, targets, grads = inputs(dtype=torch.float32)
    half = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in half]
    found = token_logprobs(half[0], half[1], targets, temperature=1.0, chunk=4)
    expected = whole(exact[0], exact[1], targets, 1.0)
    assert found[0].dtype == torch.float32
    assert (found[0] - expected[0]).abs().max() < 0.1
    got = torch.autograd.grad((found[0] * grads[0]).sum(), half)
    want = torch.autograd.grad((expected[0] * grads[0]).sum(), exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.02 * b.norm()


def vocabulary_parallel(world: World, softcap: float | None) -> tuple[Tensor, ...]:
    hidden, weight, targets, grads = inputs()
    part = weight[world.rank * 300 : (world.rank + 1) * 300].clone().requires_grad_()
    hidden.requires_grad_()
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=2)
    found = token_logprobs(hidden, part, targets, temperature=0.7, chunk=4, tp=tp, softcap=softcap)
    d_hidden, d_part = torch.autograd.grad((torch.stack(found) * grads).sum(), (hidden, part))
    return found[0].detach(), found[1].detach(), d_hidden, d_part


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_vocabulary_parallel_equals_one_rank(softcap: float | None) -> None:
    hidden, weight, targets, grads = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    expected = whole(hidden, weight, targets, 0.7, softcap)
    d_hidden, d_weight = torch.autograd.grad(
        (torch.stack(expected) * grads).sum(), (hidden, weight)
    )
    results = run_ranks(vocabulary_parallel, 2, softcap)
    for logprobs, entropy, d_hidden_rank, _ in results:
        torch.testing.assert_close(logprobs, expected[0].detach())
        torch.testing.assert_close(entropy, expected[1].detach())
        torch.testing.assert_close(d_hidden_rank, d_hidden)
    torch.testing.assert_close(torch.cat([r[3] for r in results]), d_weight)
