"""Norm, SwiGLU and rotary embedding in C equal torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmdrl.models.fused import rms_norm, swiglu
from spmdrl.models.kernels.cpu import Rows, rows_for
from spmdrl.models.rope import rope_tables, rotate


@pytest.fixture
def rows() -> Rows:
    found = rows_for(torch.zeros(1))
    assert found is not None, "no C compiler, or the kernels do not compile"
    return found


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=2e-6, atol=2e-6)


# The last has more values than one thread takes.
@pytest.mark.parametrize("count", [0, 1, 37, 2000])
@pytest.mark.parametrize("width", [1, 24, 64, 83])
def test_rms_norm(rows: Rows, count: int, width: int) -> None:
    x, weight = draw(count, width), draw(width)
    same(rows.rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (width,), weight.double(), 1e-5))
    heads = draw(count, 5, width)
    for view in (heads, heads[:, 1:3], draw(count, width, 5).transpose(1, 2)):
        expected = F.rms_norm(view.double(), (width,), weight.double(), 1e-5)
        same(rows.rms_norm(view, weight, 1e-5), expected)


@pytest.mark.parametrize("count", [0, 1, 37, 2000])
@pytest.mark.parametrize("width", [1, 24, 83])
def test_swiglu(rows: Rows, count: int, width: int) -> None:
    x = draw(count, 2 * width) * 30  # gates to where e^-x leaves float32
    wide = x.double()
    same(rows.swiglu(x), F.silu(wide[:, :width]) * wide[:, width:])


@pytest.mark.parametrize("count", [0, 1, 37, 2000])
def test_rotate(rows: Rows, count: int) -> None:
    frequencies = 10000.0 ** -(torch.arange(8) / 8)
    cos, sin = rope_tables(torch.arange(count) * 7, frequencies, 1.0)
    fused = draw(count, 6, 16)
    for x in (fused, fused[:, :4], fused[:, 1:], draw(count, 16, 3).transpose(1, 2)):
        wide = x.double()
        swapped = torch.cat((-wide[..., 8:], wide[..., :8]), dim=-1)
        plain = torch.cat((sin[..., 8:], sin[..., 8:]), dim=-1).double()
        same(rows.rotate(x, cos, sin), wide * cos.double() + swapped * plain)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [16, 6])
def test_rotate_of_a_part_and_of_neighbours(rows: Rows, turned: int, interleaved: bool) -> None:
    frequencies = 10000.0 ** -(torch.arange(turned // 2) / 8)
    cos, sin = rope_tables(torch.arange(37) * 7, frequencies, 1.0)
    fused = draw(37, 6, 16)
    for x in (fused, fused[:, 1:], draw(37, 16, 3).transpose(1, 2)):
        # where a gradient is needed, PyTorch's operations compute it
        expected = rotate(x.double().requires_grad_(), cos.double(), sin.double(), interleaved)
        assert not torch.equal(expected, x.double())
        same(rows.rotate(x, cos, sin, interleaved), expected.detach())


def test_what_is_not_finite_stays_seen(rows: Rows) -> None:
    for bad in (torch.nan, torch.inf):
        x = draw(4, 32)
        x[2, 5] = bad
        assert rows.swiglu(x).isfinite().all(1).tolist() == [True, True, False, True]
        assert rows.rms_norm(x, torch.ones(32), 1e-5).isnan().any(1).tolist()[2]


def test_a_row_is_the_same_whatever_stands_beside_it(rows: Rows) -> None:
    x, weight = draw(3000, 64), draw(64)
    assert torch.equal(rows.rms_norm(x, weight, 1e-5)[7], rows.rms_norm(x[7:8], weight, 1e-5)[0])
    assert torch.equal(rows.swiglu(x)[7], rows.swiglu(x[7:8])[0])


def test_they_serve_plain_float32_without_gradient_alone() -> None:
    x, weight = draw(4, 16), nn.Parameter(draw(16))
    with torch.no_grad():
        assert rows_for(x, weight) is not None
    assert rows_for(x) is not None
    assert rows_for(x, weight) is None
    assert rows_for(x.double()) is None
    assert rows_for(x.to("meta")) is None
    with torch._subclasses.FakeTensorMode():
        assert rows_for(torch.empty(4, 16)) is None


def spied(kernel: Callable[..., Tensor], used: list[str]) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        used.append(kernel.__name__)
        return kernel(*arguments)

    return call


def test_the_models_functions_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("rms_norm", "swiglu", "rotate"):
        monkeypatch.setattr(Rows, name, spied(getattr(Rows, name), used))
    x, weight = draw(4, 16), nn.Parameter(draw(16))
    tables = draw(4, 1, 4), draw(4, 1, 4)
    with torch.no_grad():
        same(rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))
        swiglu(x)
        rotate(x.view(4, 4, 4), *tables)
    assert used == ["rms_norm", "swiglu", "rotate"]
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None and len(used) == 3


def test_operands_that_do_not_fit_are_refused(rows: Rows) -> None:
    """The kernels would read beyond them."""
    with pytest.raises(AssertionError):
        rows.rms_norm(draw(3, 8), draw(7), 1e-5)
    with pytest.raises(AssertionError):
        rows.swiglu(draw(2, 3, 8))
    tables = draw(3, 1, 8), draw(3, 1, 8)
    rows.rotate(draw(3, 2, 8), *tables)
    for heads in (draw(4, 2, 8), draw(3, 2, 6)):
        with pytest.raises(AssertionError):
            rows.rotate(heads, *tables)
