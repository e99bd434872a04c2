"""The product for few rows equals `F.linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spmdrl.models.linear import linear


@pytest.mark.parametrize("rows", [1, 4, 9, 15, 16, 40])
@pytest.mark.parametrize("columns", [25, 96, 100, 384, 512])
def test_few_rows_equal_the_plain_product(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=generator)
    weight = torch.randn(columns, 64, generator=generator)
    bias = torch.randn(columns, generator=generator)
    for b in (None, bias):
        with torch.no_grad():
            found = linear(x, weight, b)
        torch.testing.assert_close(found, F.linear(x, weight, b), rtol=0, atol=1e-5)
    strided = torch.randn(rows, 128, generator=generator)[:, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(linear(strided, weight), F.linear(strided, weight))


def test_gradients_are_those_of_the_plain_product() -> None:
    x, weight = torch.randn(8, 32), torch.randn(64, 32, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(64, 32))
