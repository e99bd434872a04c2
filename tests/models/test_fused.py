"""SwiGLU and norm in blocks against torch's own, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmdrl.models import fused


@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    monkeypatch.setattr(fused, "BLOCK_BYTES", 1000)  # a few rows a block
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, heads, weight = draw(num_rows, 24), draw(num_rows, 3, 12), draw(12)
    check(lambda: fused.swiglu(x), lambda: F.silu(x[:, :12]) * x[:, 12:], (x,))
    check(
        lambda: fused.rms_norm(heads, weight, 1e-5),
        lambda: F.rms_norm(heads, (12,), weight, 1e-5),
        (heads, weight),
    )
    strided = heads[:, 1:]
    check(
        lambda: fused.rms_norm(strided, weight, 1e-5),
        lambda: F.rms_norm(strided, (12,), weight, 1e-5),
        (heads, weight),
    )


def check(
    found: Callable[[], Tensor], expected: Callable[[], Tensor], inputs: tuple[Tensor, ...]
) -> None:
    a, b = found(), expected()
    torch.testing.assert_close(a, b)
    grad = torch.randn_like(b)
    torch.testing.assert_close(
        torch.autograd.grad(a, inputs, grad), torch.autograd.grad(b, inputs, grad)
    )


def test_inference_and_half_precision_take_torchs_own() -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    assert torch.equal(fused.rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    half = x.bfloat16().requires_grad_()
    assert fused.swiglu(half).dtype == torch.bfloat16
