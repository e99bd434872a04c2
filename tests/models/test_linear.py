"""Products by oneDNN equal `F.linear`, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models import linear as linear_module
from spmdrl.models.kernels.cpu import Panels, lay_out
from spmdrl.models.linear import in_blocks, linear, product, serves


def _operands(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(columns, 64, generator=generator)
    return x, weight, torch.randn(columns, generator=generator)


@pytest.mark.parametrize("rows", [0, 1, 4, 9, 33, 200])
@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize("columns", [1, 25, 96, 512])
def test_the_product_is_that_of_torch(
    rows: int, columns: int, panels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_HAS_PANELS", panels)
    x, weight, bias = _operands(rows, columns)
    for b in (None, bias):
        expected = F.linear(x, weight, b)
        with torch.inference_mode():
            torch.testing.assert_close(linear(x, weight, b), expected, rtol=0, atol=1e-5)
            laid_out = in_blocks(weight)
            assert isinstance(laid_out, Panels) == panels
            blocked = linear(x, weight, b, laid_out)
            torch.testing.assert_close(blocked, expected, rtol=0, atol=1e-5)
    strided = torch.randn(rows, 128)[:, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(linear(strided, weight), F.linear(strided, weight))


@pytest.mark.parametrize("rows", [1, 70])
def test_panels_of_many_columns(rows: int) -> None:
    """More columns than are summed at once, and more rows than a core's cache holds of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4100, generator=generator) / 64
    weight = torch.randn(50, 4100, generator=generator)
    panels = lay_out(weight)
    assert panels is not None
    expected = F.linear(x.double(), weight.double()).float()
    for part in (x, torch.cat((x, x), dim=1)[:, :4100]):
        torch.testing.assert_close(panels.product(part), expected, rtol=0, atol=5e-5)


def test_panels_refuse_rows_of_another_length() -> None:
    """The kernel would read beyond them."""
    panels = lay_out(torch.ones(50, 64))
    assert panels is not None
    assert panels.product(torch.ones(0, 64)).shape == (0, 50)
    for length in (63, 65):
        with pytest.raises(AssertionError):
            panels.product(torch.ones(3, length))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rows", [0, 8, 100])
def test_gradients_are_those_of_the_plain_product(
    rows: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_IS_NARROW", narrow)
    operands = [t.requires_grad_() for t in _operands(rows, 48)]
    x, weight, bias = operands
    factors = torch.randn(rows, 48)
    found = torch.autograd.grad((linear(x, weight, bias) * factors).sum(), operands)
    expected = torch.autograd.grad((F.linear(x, weight, bias) * factors).sum(), operands)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_frozen_operand_gets_no_gradient() -> None:
    x, weight, _ = _operands(8, 48)
    linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None and x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(48, 64))


def test_only_float32_on_the_cpu_is_served() -> None:
    x, weight, _ = _operands(8, 48)
    assert serves(x, weight)
    assert not serves(x.double(), weight.double())
    assert not serves(x.bfloat16(), weight.bfloat16())
    wide = linear(x.double().requires_grad_(), weight.double())
    torch.testing.assert_close(wide, F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("narrow", [False, True])
def test_products_of_any_strides(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_IS_NARROW", narrow)
    a, b, _ = _operands(40, 48)
    for left in (a, a.t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            torch.testing.assert_close(product(left, right), a @ b.t(), rtol=0, atol=1e-5)
