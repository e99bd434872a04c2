"""Norm with addition, SwiGLU and rotary embedding in Triton: against float64, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernel_proofs as proofs
from spmdrl.models import rope

pytestmark = pytest.mark.full  # test_cuda_training has a case that always runs

MODULE = "spmdrl.models.kernels.cuda.rows"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[..., Any]


def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=random) * size).to(dtype)


def same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with float64: one rounding to dtype, and float32's own."""
    tolerance = max(torch.finfo(dtype).eps, 4e-6)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def compare_norm(width: int, dtype: torch.dtype, module: Any = None) -> None:
    if module is None:
        from spmdrl.models.kernels.cuda import rows as module
    for tokens in (0, 1, 5):
        x, out = draw(tokens, width, dtype=dtype), draw(tokens, width, size=3.0, dtype=dtype)
        weight = draw(width, dtype=dtype)
        for scale, one_plus, added in ((1.0, False, out), (0.25, True, out), (1.0, False, None)):
            total, normed = module.add_rms_norm(
                x, added, weight, 1e-5, scale=scale, one_plus=one_plus
            )
            if added is None:
                assert total is x
            else:
                same(total, x.double() + scale * out.double(), dtype)
            factor = weight.double() + one_plus
            same(normed, F.rms_norm(total.double(), (width,), factor, 1e-5), dtype)


@pytest.mark.parametrize("width", [1, 64, 83, 1536, 4096])
def test_norm(interpreted: Run, width: int) -> None:
    for dtype in DTYPES:
        interpreted(compare_norm, width, dtype)


def compare_norm_backward(width: int, dtype: torch.dtype, module: Any = None) -> None:
    if module is None:
        from spmdrl.models.kernels.cuda import rows as module
    module.PARTS = 3  # so that a program has several rows
    for tokens in (0, 1, 8):
        total, weight = draw(tokens, width, size=3.0, dtype=dtype), draw(width, dtype=dtype)
        d_normed, d_total = (draw(tokens, width, size=s, dtype=dtype) for s in (1.0, 0.3))
        for one_plus, others in ((False, d_total), (True, None)):
            wide = total.double().requires_grad_(), weight.double().requires_grad_()
            normed = F.rms_norm(wide[0], (width,), wide[1] + one_plus, 1e-5)
            expected = list(torch.autograd.grad(normed, wide, d_normed.double()))
            if others is not None:
                expected[0] += others.double()
            d, d_weight = module.add_rms_norm_backward(
                total, weight, d_normed, others, 1e-5, one_plus=one_plus
            )
            same(d, expected[0], dtype)
            same(d_weight, expected[1], torch.float32)


@pytest.mark.parametrize("width", [1, 83, 1536, 8192])
def test_norm_backward(interpreted: Run, width: int) -> None:
    for dtype in DTYPES:
        interpreted(compare_norm_backward, width, dtype)


def silu_products(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def compare_swiglu(width: int, dtype: torch.dtype, module: Any = None) -> None:
    if module is None:
        from spmdrl.models.kernels.cuda import rows as module
    for tokens in (0, 1, 5):
        # gates to where e^-x leaves float32
        gate_up = draw(tokens, 2 * width, size=30.0, dtype=dtype)
        same(module.swiglu(gate_up), silu_products(gate_up.double()), dtype)
        grad = draw(tokens, width, dtype=dtype)
        wide = gate_up.double().requires_grad_()
        [expected] = torch.autograd.grad(silu_products(wide), wide, grad.double())
        same(module.swiglu_backward(gate_up, grad), expected, dtype)


@pytest.mark.parametrize("width", [1, 83, 1024, 2050])
def test_swiglu(interpreted: Run, width: int) -> None:
    for dtype in DTYPES:
        interpreted(compare_swiglu, width, dtype)


def compare_rope(
    heads: int, dims: int, turned: int, interleaved: bool, dtype: torch.dtype, module: Any = None
) -> None:
    if module is None:
        from spmdrl.models.kernels.cuda import rows as module
    for tokens in (0, 1, 5):
        frequencies = 10000.0 ** -(torch.arange(turned // 2) / 8)
        cos, sin = rope.rope_tables(torch.arange(tokens) * 7, frequencies, 1.5)
        tables = cos.double(), sin.double()
        fused = draw(tokens, heads + 2, dims, dtype=dtype)
        for x in (fused[:, :heads], fused[:, 2:], draw(tokens, heads, dims, dtype=dtype)):
            wide = x.double().requires_grad_()
            expected = rope.rotate(wide, *tables, interleaved)
            same(module.rotate(x, cos, sin, interleaved), expected.detach(), dtype)
            grad = draw(tokens, heads + 1, dims, dtype=dtype)[:, :heads]
            [back] = torch.autograd.grad(expected, wide, grad.double())
            same(module.rotate_backward(grad, cos, sin, interleaved), back, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", [(3, 64, 64), (1, 128, 128), (9, 96, 24), (2, 10, 6)], ids=str)
def test_rope(interpreted: Run, sizes: tuple[int, int, int], interleaved: bool) -> None:
    for dtype in DTYPES:
        interpreted(compare_rope, *sizes, interleaved, dtype)


def not_finite() -> None:
    from spmdrl.models.kernels.cuda import rows

    for bad in (torch.nan, torch.inf):
        x = draw(4, 64)
        x[2, 5] = bad
        normed = rows.add_rms_norm(x, draw(4, 64), torch.ones(64), 1e-5)[1]
        assert normed[2].isnan().any() and normed[[0, 1, 3]].isfinite().all()
        found = rows.swiglu(x)
        assert not found[2, 5].isfinite() and found[[0, 1, 3]].isfinite().all()


def test_what_is_not_finite_stays_seen(interpreted: Run) -> None:
    interpreted(not_finite)


def at_fault(old: str, new: str, directory: Path, check: Any, *arguments: Any) -> None:
    module = proofs.planted(MODULE, old, new, directory)
    with pytest.raises(AssertionError):
        check(*arguments, torch.float32, module)


@pytest.mark.parametrize(
    "old, new, check, arguments",
    [
        ("/ WIDTH", "/ WIDE", compare_norm, (83,)),
        ("factor += 1.0", "factor += 0.0", compare_norm, (64,)),
        ("scale * added", "added", compare_norm, (64,)),
        ("found += tl.load(d_total", "found -= tl.load(d_total", compare_norm_backward, (64,)),
        ("turn * step", "turn", compare_norm_backward, (64,)),
        ("of_weight += given * row", "of_weight += given", compare_norm_backward, (64,)),
        ("parts + part * WIDTH", "parts + part * WIDTH // 2", compare_norm_backward, (64,)),
        ("(tl.sum(given * row, 0) / WIDTH)", "0.0", compare_norm_backward, (64,)),
        ("token * 2 * width", "token * width", compare_swiglu, (83,)),
        ("(1.0 - s)", "(1.0 + s)", compare_swiglu, (83,)),
        ("        s = -s\n", "        s = s\n", compare_rope, (3, 64, 64, False)),
        ("token * x_token", "token * heads * DIMS", compare_rope, (3, 64, 64, False)),
        ("target + dim, value,", "target + dim, -value,", compare_rope, (9, 96, 24, True)),
    ],
)
def test_planted_faults(
    interpreted: Run, tmp_path: Path, old: str, new: str, check: Any, arguments: tuple[Any, ...]
) -> None:
    interpreted(at_fault, old, new, tmp_path, check, *arguments)


def row_figures(name: str, architecture: int, module: Any = None) -> proofs.Figures:
    """Compile with the sizes of a model of 8 billion parameters."""
    from spmdrl.models.kernels.cuda import rows

    floats, halves = ("scale", "eps"), ("x", "out", "weight", "total", "normed", "result")
    types = {
        **dict.fromkeys((*halves, "gate_up", "grad", "d", "d_normed", "d_total"), "*bf16"),
        **dict.fromkeys(("cos", "sin", "parts"), "*fp32"),
        **dict.fromkeys(floats, "fp32"),
        **dict.fromkeys(("width", "x_token", "out_token", "heads", "tokens"), "i32"),
    }
    width = 8192 if name == "add_norm_backward_rows" else 4096
    of_norm = {"WIDTH": width, "WIDE": width, "ADDS": True, "ONE_PLUS": False}
    constants: dict[str, Any] = {
        "add_norm_row": of_norm,
        "add_norm_backward_rows": of_norm,
        "swiglu_block": {"BLOCK": rows.BLOCK},
        "swiglu_backward_block": {"BLOCK": rows.BLOCK},
        "rotate_heads": {
            "DIMS": 128,
            "TURNED": 128,
            "ROWS": 16,
            "WIDE": 64,
            "REST": 0,
            "INTERLEAVED": False,
            "BACKWARD": False,
        },
    }[name]
    kernel = getattr(module or rows, name)
    tensors = {n: types[n] for n in kernel.arg_names if n not in constants}
    warps = rows.warps_for(width) if name.startswith("add_norm") else 4
    return proofs.compiled(
        kernel, architecture, tensors, constants, odd=("tokens",), num_warps=warps
    )


KERNELS = [
    "add_norm_row",
    "add_norm_backward_rows",
    "swiglu_block",
    "swiglu_backward_block",
    "rotate_heads",
]


def check_row(found: proofs.Figures) -> None:
    proofs.check(found, most_scalar=0, least_wide=2)


def test_compiled_rows() -> None:
    for name in KERNELS[:2]:
        check_row(row_figures(name, 90))


@pytest.mark.full
@pytest.mark.parametrize("architecture", proofs.ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_rows_of_all_architectures(name: str, architecture: int) -> None:
    check_row(row_figures(name, architecture))
