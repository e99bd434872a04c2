"""Log-probabilities over the tokens that a draw could have been, against a masked softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness import run_ranks
from spmdrl.batch import Ragged
from spmdrl.distributed.parallel import Parallel
from spmdrl.training import logprobs as module
from spmdrl.training import support as support_module
from spmdrl.training.logprobs import token_logprobs
from spmdrl.training.support import support_at
from spmdrl.world import World

N, V, D = 13, 600, 8


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, torch.randn(2, N, generator=generator, dtype=dtype)


def column(targets: Tensor, counts: list[int]) -> Ragged:
    """Of each place so many ids, the target among them."""
    generator = torch.Generator().manual_seed(1)
    values = []
    for target, count in zip(targets.tolist(), counts, strict=True):
        others = torch.randperm(V, generator=generator)
        others = others[others != target][: max(count - 1, 0)]
        ids = torch.cat((others, torch.tensor([target] * (count > 0), dtype=torch.int64)))
        values.append(ids[torch.randperm(len(ids), generator=generator)])
    return Ragged(
        counts=torch.tensor(counts, dtype=torch.int32), values=torch.cat(values).to(torch.int32)
    )


COUNTS = {
    "some": [0, 3, 1, 0, 256, 5, 0, 2, 0, 17, 600, 0, 4],
    "all": [2, 3, 1, 7, 256, 5, 9, 2, 1, 17, 40, 3, 4],
    "none": [0] * N,
}


def masked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ids: Ragged,
    temperature: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    products = hidden @ weight.T
    capped = products if softcap is None else softcap * torch.tanh(products / softcap)
    logits = capped / temperature
    keep = torch.zeros(N, V, dtype=torch.bool)
    table = ids.padded(-1).long()
    for row in range(N):
        own = table[row][table[row] >= 0]
        keep[row, own if len(own) else slice(None)] = True
    below = logits.masked_fill(~keep, -torch.inf).log_softmax(-1)
    whole = logits.log_softmax(-1)
    return below.gather(1, targets[:, None])[:, 0], -(whole.exp() * whole).sum(-1)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_TILE", 1)


def loss_of(found: tuple[Tensor, Tensor], grads: Tensor, use: str) -> Tensor:
    loss = (found[0] * grads[0]).sum()
    return loss + (found[1] * grads[1]).sum() if use == "both" else loss


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("use", ["logprobs", "both"])
@pytest.mark.parametrize(
    ("chunk", "temperature", "softcap"),
    [(1, 1.0, None), (4, 0.6, None), (100, 1.3, None), (4, 0.6, 3.0)],
)
def test_values_and_gradients_equal_a_masked_softmax(
    counts: str, use: str, chunk: int, temperature: float, softcap: float | None
) -> None:
    hidden, weight, targets, grads = inputs()
    ids = column(targets, COUNTS[counts])
    hidden.requires_grad_(), weight.requires_grad_()
    expected = masked(hidden, weight, targets, ids, temperature, softcap)
    support = support_at(ids, torch.arange(N), targets)
    assert (support is None) == (counts == "none")
    found = token_logprobs(
        *(hidden, weight, targets),
        temperature=temperature,
        chunk=chunk,
        support=support,
        softcap=softcap,
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(loss_of(found, grads, use), (hidden, weight)),
        torch.autograd.grad(loss_of(expected, grads, use), (hidden, weight)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_supported_logprobs_do_not_depend_on_whether_the_entropy_is_computed() -> None:
    hidden, weight, targets, grads = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    support = support_at(column(targets, COUNTS["some"]), torch.arange(N), targets)
    found = []
    for with_entropy in (True, False):
        logprobs = token_logprobs(
            *(hidden, weight, targets),
            temperature=0.7,
            chunk=4,
            support=support,
            with_entropy=with_entropy,
        )[0]
        loss = (logprobs * grads[0]).sum()
        found.append((logprobs, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_give_float32_results(dtype: torch.dtype) -> None:
    hidden, weight, targets, grads = inputs()
    held = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in held]
    ids = column(targets, COUNTS["some"])
    support = support_at(ids, torch.arange(N), targets)
    found = token_logprobs(*held, targets, temperature=0.7, chunk=4, support=support)
    expected = masked(*exact, targets, ids, 0.7)
    bound = 1e-5 if dtype == torch.float32 else 0.1
    assert found[0].dtype == torch.float32
    assert float((found[0] - expected[0]).detach().abs().max()) < bound
    got = torch.autograd.grad((found[0] * grads[0]).sum(), held)
    want = torch.autograd.grad((expected[0] * grads[0]).sum(), exact)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < (1e-5 if dtype == torch.float32 else 0.02) * b.norm()


def vocabulary_parallel(world: World, cut: int, softcap: float | None) -> tuple[Tensor, ...]:
    hidden, weight, targets, grads = inputs()
    first, stop = (0, cut) if world.rank == 0 else (cut, V)
    part = weight[first:stop].clone().requires_grad_()
    hidden.requires_grad_()
    tp = Parallel(group=dist.group.WORLD, rank=world.rank, size=2)
    support = support_at(column(targets, COUNTS["some"]), torch.arange(N), targets)
    found = token_logprobs(
        *(hidden, part, targets),
        temperature=0.7,
        chunk=4,
        tp=tp,
        first_id=first,
        support=support,
        softcap=softcap,
    )
    d_hidden, d_part = torch.autograd.grad(loss_of(found, grads, "both"), (hidden, part))
    return found[0].detach(), d_hidden, d_part


@pytest.mark.parametrize(("cut", "softcap"), [(300, None), (600, None), (300, 3.0)])
def test_vocabulary_parallel_equals_one_rank(cut: int, softcap: float | None) -> None:
    """Also where a rank has no tokens at all."""
    hidden, weight, targets, grads = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    expected = masked(hidden, weight, targets, column(targets, COUNTS["some"]), 0.7, softcap)
    d_hidden, d_weight = torch.autograd.grad(loss_of(expected, grads, "both"), (hidden, weight))
    results = run_ranks(vocabulary_parallel, 2, cut, softcap)
    for logprobs, d_hidden_rank, _ in results:
        torch.testing.assert_close(logprobs, expected[0].detach())
        torch.testing.assert_close(d_hidden_rank, d_hidden)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), d_weight)


def test_a_token_that_was_not_among_them_is_refused() -> None:
    _, _, targets, _ = inputs()
    ids = column(targets, COUNTS["all"])
    changed = targets.clone()
    changed[5] = int((targets[5] + 1) % V)
    own = ids.select(torch.tensor([5])).values
    assert int(changed[5]) not in own.tolist()
    with pytest.raises(ValueError, match=f"token {int(changed[5])} at place 5 .*support_ids"):
        support_at(ids, torch.arange(N), changed)


Products = list[tuple[torch.dtype, torch.dtype]]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    """The operands' dtypes of every product with the head."""
    seen: Products = []
    own = ("wide_linear", "wide_product", "add_product")
    places = [(module, name) for name in own]
    places += [(support_module, name) for name in ("product", "wide_linear")]
    for place, name in places:
        plain: Callable[..., Any] = getattr(place, name)

        def noted(*operands: Tensor, plain: Callable[..., Any] = plain) -> Any:
            a, b = operands[-2:]  # before them: what is added to
            seen.append((a.dtype, b.dtype))
            return plain(*operands)

        monkeypatch.setattr(place, name, noted)
    return seen


@pytest.mark.parametrize("use", ["logprobs", "both"])
@pytest.mark.parametrize("counts", ["none", "some"])
def test_products_are_in_the_weights_dtype(products: Products, use: str, counts: str) -> None:
    hidden, weight, targets, grads = inputs()
    held = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    support = support_at(column(targets, COUNTS[counts]), torch.arange(N), targets)
    found = token_logprobs(*held, targets, temperature=0.7, chunk=4, support=support)
    loss_of(found, grads.float(), use).backward()
    assert len(products) > 4 and set(products) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
@pytest.mark.parametrize("use", ["logprobs", "both"])
def test_gradients_that_nobody_wants_are_not_computed(
    products: Products, trained: str, use: str
) -> None:
    """Forward, the logits again, and a product for each gradient: of 4 chunks."""
    hidden, weight, targets, grads = inputs()
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    found = token_logprobs(hidden, weight, targets, temperature=0.7, chunk=4)
    loss_of(found, grads, use).backward()
    assert len(products) == (16 if trained == "both" else 12)
    assert (hidden.grad is None) == (trained == "weight")
    assert (weight.grad is None) == (trained == "hidden")


def test_the_temperature_divides_logits_and_not_what_is_rounded() -> None:
    """In bfloat16 the gap to the sampler's log-probabilities at a temperature is that at 1."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(64, 256, generator=generator).bfloat16()
    weight = (torch.randn(2000, 256, generator=generator) / 4).bfloat16()
    targets = torch.randint(2000, (64,), generator=generator)
    sampler = (hidden @ weight.T).float()
    for temperature in (0.6, 0.7, 0.8, 1.0, 1.2):
        expected = (sampler / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        found, _ = token_logprobs(hidden, weight, targets, temperature=temperature, chunk=16)
        # equal products: what is left is float32's rounding
        assert float((found - expected).abs().max()) < 1e-4, temperature


def test_no_places_have_no_support() -> None:
    empty = Ragged(counts=torch.zeros(0, dtype=torch.int32), values=torch.zeros(0).int())
    none = torch.zeros(0, dtype=torch.int64)
    assert support_at(empty, none, none) is None
