"""Gradients that products add to a float32 sum: those of autograd, before it would round them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models.gradient_sums import GradientSum, summed_embedding, summed_linear
from spmdrl.training.logprobs import token_logprobs


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=random).to(dtype).requires_grad_()


def test_a_product_adds_its_weights_gradient_and_gives_autograd_the_others() -> None:
    weight, bias, total = draw(5, 8), draw(5), GradientSum()
    expected = torch.zeros(5, 8)
    for tokens in (3, 0, 4):  # microbatches
        x, grad = draw(tokens, 8), draw(tokens, 5).detach()
        out = summed_linear(x, weight, bias, total)
        plain = F.linear(x, weight, bias)
        assert torch.equal(out, plain)
        found = torch.autograd.grad(out, (x, bias), grad)
        *others, d_weight = torch.autograd.grad(plain, (x, bias, weight), grad)
        expected += d_weight.float()
        torch.testing.assert_close(found, tuple(others), rtol=0, atol=0)
    taken = total.take()
    assert taken is not None and taken.dtype == torch.float32 and weight.grad is None
    torch.testing.assert_close(taken, expected, rtol=1e-6, atol=1e-6)
    assert total.take() is None


def test_a_tied_weight_has_one_sum_of_both_uses() -> None:
    """The head's part is not rounded, the embedding's rows are added where they are."""
    weight, total = draw(600, 8), GradientSum()
    tokens = torch.tensor([3, 5, 3, 9])
    targets = torch.tensor([1, 7, 7, 2])

    def run(table: Tensor, own: GradientSum | None) -> None:
        hidden = F.embedding(tokens, table) if own is None else summed_embedding(tokens, table, own)
        found = token_logprobs(hidden, table, targets, temperature=1.0, chunk=2, gradient_sum=own)
        (found[0] * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()

    for _ in range(2):
        run(weight, total)
    plain = weight.detach().clone().requires_grad_()
    run(plain, None)
    taken, expected = total.take(), plain.grad
    assert weight.grad is None and taken is not None and expected is not None
    torch.testing.assert_close(taken / 2, expected.float(), rtol=1e-2, atol=1e-3)
    # rows that neither use is large in: bfloat16 would keep no more than 8 bits of them
    assert not torch.equal(taken, taken.bfloat16().float())


def test_without_a_gradient_nothing_is_added() -> None:
    """A pass that only reads, of weights that train, leaves no sum."""
    from spmdrl.models.blocks.projections import Build, Embedding, Projection
    from spmdrl.models.specs import NormSpec

    build = Build(norm=NormSpec(eps=1e-5), dtype=torch.bfloat16, device="cpu")
    projection, embedding = Projection(4, 8, build), Embedding(10, 8, build)
    for module in (projection, embedding):
        torch.nn.init.normal_(module.weight)
        module.gradient_sum = GradientSum()
    tokens = torch.tensor([1, 2])
    with torch.no_grad():
        projection(embedding(tokens))
    assert projection.gradient_sum.total is None and embedding.gradient_sum.total is None
    projection(embedding(tokens)).sum().backward()
    assert projection.weight.grad is None and embedding.weight.grad is None
    found = projection.gradient_sum.take()
    assert found is not None
    expected = embedding.weight[tokens].float().sum(0).expand(4, 8)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-2, atol=1e-2)
    rows = embedding.gradient_sum.take()
    assert rows is not None and rows.abs().sum(1).nonzero().flatten().tolist() == [1, 2]
