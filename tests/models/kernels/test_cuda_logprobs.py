"""Passes over logits for log-probabilities, in Triton: against float64, and as compiled code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_proofs as proofs

MODULE = "spmdrl.models.kernels.cuda.logprobs"
Run = Callable[..., Any]


def draw(rows: int, width: int, size: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits with a gap behind each row that holds larger ones, and columns inside and outside."""
    random = torch.Generator().manual_seed(width + rows)
    wide = torch.randn(rows, width + 16, generator=random) * size
    wide[:, width:] = 1e4
    return wide[:, :width], torch.randint(-3, width + 3, (rows,), generator=random)


def compare_sums(given: tuple[Tensor, Tensor], scale: float, module: Any = None) -> None:
    if module is None:
        from spmdrl.models.kernels.cuda import logprobs as module
    logits, places = given
    z = logits.double() * scale
    peak = z.amax(1)
    below = z - peak[:, None]
    weight = below.exp()
    inside = (places >= 0) & (places < logits.shape[1])
    target = z.gather(1, places.masked_fill(~inside, 0)[:, None])[:, 0] * inside
    product = (weight * below).where(weight > 0, 0).sum(1)
    for with_product in (True, False):
        found = module.reduce_logits(logits, places, scale, with_product=with_product)
        expected = (peak, weight.sum(1), product * with_product, target)
        for own, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(own.double(), wanted, rtol=3e-6, atol=3e-6)


def compare_factors(
    given: tuple[Tensor, Tensor],
    scale: float,
    dtype: torch.dtype = torch.float32,
    module: Any = None,
) -> None:
    if module is None:
        from spmdrl.models.kernels.cuda import logprobs as module
    logits, places = given
    random = torch.Generator().manual_seed(len(logits))
    g, d_entropy = torch.randn(2, len(logits), generator=random)
    logarithms = (logits.double() * scale).log_softmax(1)
    p = logarithms.exp()
    entropy = -(p * logarithms).where(p > 0, 0).sum(1)
    normaliser = (logits.double() * scale).logsumexp(1).float()
    of_target = (torch.arange(logits.shape[1]) == places[:, None]) * g[:, None].double()
    spread = d_entropy[:, None] * (logarithms + entropy[:, None])
    tolerance = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    calls = [
        (None, of_target - p * g[:, None]),
        ((entropy.float(), d_entropy), of_target - (p * (g[:, None] + spread)).where(p > 0, 0)),
    ]
    for terms, wanted in calls:
        found = module.logit_factors(logits, places, normaliser, g, terms, scale, dtype)
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance / 50)


def with_absent(given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rule tokens out: whole blocks, and all but one."""
    logits, places = given
    logits[0, :4096] = -torch.inf
    logits[1, :-1] = -torch.inf
    logits[2, 1:] = -torch.inf
    return logits, places


@pytest.mark.parametrize("width", [1, 257, 8200])
def test_values(interpreted: Run, width: int) -> None:
    for rows, scale in ((0, 1.0), (3, 1.0), (3, 1.7)):
        interpreted(compare_sums, draw(rows, width), scale)
        interpreted(compare_factors, draw(rows, width), scale)


def test_tokens_that_are_ruled_out(interpreted: Run) -> None:
    given = with_absent(draw(3, 8200))
    interpreted(compare_sums, given, 1.3)
    interpreted(compare_factors, given, 1.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_rounded_once(interpreted: Run, dtype: torch.dtype) -> None:
    interpreted(compare_factors, draw(3, 600), 1.0, dtype)


def gradients_by_kernels(arguments: dict[str, Any]) -> None:
    """Hold log-probabilities and gradients of the trainer's function to those by torch."""
    from spmdrl.models.kernels import gpu
    from spmdrl.training.logprobs import token_logprobs

    random = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 16, generator=random), torch.randn(600, 16, generator=random)
    targets = torch.randint(600, (7,), generator=random)
    factors = torch.randn(2, 7, generator=random)
    found = []
    for serves in (False, True):
        gpu.runs_on = lambda device, own=serves: own
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = token_logprobs(h, w, targets, temperature=0.7, chunk=4, **arguments)
        loss = sum((v * f).sum() for v, f in zip(values, factors, strict=False))
        found.append([*values, *torch.autograd.grad(loss, (h, w))])
    for own, wanted in zip(*reversed(found), strict=True):
        torch.testing.assert_close(own, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("arguments", [{}, {"with_entropy": False}, {"first_id": 300}], ids=str)
def test_the_trainers_gradients(interpreted: Run, arguments: dict[str, Any]) -> None:
    interpreted(gradients_by_kernels, arguments)


def at_fault(old: str, new: str, directory: Path, check: Any, given: tuple[Tensor, Tensor]) -> None:
    module = proofs.planted(MODULE, old, new, directory)
    with pytest.raises(AssertionError):
        check(given, 1.3, module=module)


@pytest.mark.parametrize(
    "old, new, check",
    [
        ("row * row_stride", "(row + 1) % 3 * row_stride", compare_sums),  # the neighbour's
        ("own = column < width", "own = column < width + 1", compare_sums),
        ("kept * mass", "mass", compare_sums),
        ("(product + moved)", "product", compare_sums),
        ("(column == place)", "(column == place + 1)", compare_sums),
        ("(logarithm + ", "(logarithm - ", compare_factors),
        ("column == tl.load(places", "column == 1 + tl.load(places", compare_factors),
        ("row * row_stride", "(row + 1) % 3 * row_stride", compare_factors),
    ],
)
def test_planted_faults(interpreted: Run, tmp_path: Path, old: str, new: str, check: Any) -> None:
    interpreted(at_fault, old, new, tmp_path, check, draw(3, 8200))


def figures(
    name: str, architecture: int, *, module: Any = None, flag: bool = True
) -> proofs.Figures:
    from spmdrl.models.kernels.cuda import logprobs

    kernel = getattr(module or logprobs, name)
    types = {
        **dict.fromkeys(("logits", "normaliser", "entropy", "g", "d_entropy"), "*fp32"),
        "places": "*i64",
        "found": "*fp32" if name == "reduce_row" else "*bf16",
        **dict.fromkeys(("row_stride", "width"), "i32"),
        "scale": "fp32",
    }
    switch = "WITH_PRODUCT" if name == "reduce_row" else "WITH_ENTROPY"
    constants = {"BLOCK": logprobs.BLOCK, switch: flag}
    tensors = {n: types[n] for n in kernel.arg_names if n not in constants}
    return proofs.compiled(kernel, architecture, tensors, constants, num_warps=8)


def check_passes(found: proofs.Figures) -> None:
    # a row's target, normaliser, entropy and gradients are single numbers
    proofs.check(found, most_scalar=5, least_wide=4)


def test_compiled_passes() -> None:
    check_passes(figures("reduce_row", 90))


@pytest.mark.full
@pytest.mark.parametrize("architecture", proofs.ARCHITECTURES)
@pytest.mark.parametrize("name", ["reduce_row", "factor_block"])
def test_compiled_passes_of_all_architectures(name: str, architecture: int) -> None:
    for flag in (True, False):
        check_passes(figures(name, architecture, flag=flag))
