"""Keys and values turned and laid out in Triton: against float64, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_proofs as proofs
from spmdrl.models import rope
from spmdrl.models.attention_varlen import _way_back

pytestmark = pytest.mark.full

MODULE = "spmdrl.models.kernels.cuda.laid_out"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[..., Any]
Sizes = tuple[int, int, int, int]
"""Heads of queries and of keys, dims of a head, those that are turned."""


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=random).to(dtype)


def rows_of(tokens: int) -> list[Tensor | None]:
    """Places in order, and those of a prompt of two tokens that three responses share."""
    if tokens < 5:
        return [None]
    return [None, torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, *range(4, tokens)])]


def compare(sizes: Sizes, interleaved: bool, dtype: torch.dtype, module: Any = None) -> None:
    if module is None:
        from spmdrl.models.kernels.cuda import laid_out as module
    heads, kv_heads, dims, turned = sizes
    tolerance = max(2 * torch.finfo(dtype).eps, 4e-6)
    for tokens in (0, 1, 6):
        frequencies = 10000.0 ** -(torch.arange(turned // 2) / 8)
        cos, sin = rope.rope_tables(torch.arange(tokens) * 7, frequencies, 1.5)
        whole = draw(tokens, heads + 2 * kv_heads + 1, dims, dtype=dtype)
        fused = whole[:, :-1]  # a gap between tokens
        for rows in rows_of(tokens):
            wide = fused.double().requires_grad_()
            parts = torch.split(wide, [heads, kv_heads, kv_heads], 1)
            q, k = (rope.rotate(x, cos.double(), sin.double(), interleaved) for x in parts[:2])
            k, v = (x if rows is None else x[rows] for x in (k, parts[2]))
            found = module.lay_out(fused, kv_heads, cos, sin, interleaved, rows)
            for own, expected in zip(found, (q, k, v), strict=True):
                assert own.dtype == dtype and own.is_contiguous()
                torch.testing.assert_close(
                    own.double(), expected.detach(), rtol=tolerance, atol=tolerance
                )
            grads = tuple(draw(*x.shape, dtype=dtype) for x in found)
            [expected] = torch.autograd.grad((q, k, v), wide, [g.double() for g in grads])
            places = None if rows is None else _way_back(rows)
            back = module.lay_out_backward(grads, cos, sin, interleaved, places)
            torch.testing.assert_close(back.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", [(4, 2, 64, 64), (3, 1, 128, 128), (5, 5, 96, 24)], ids=str)
def test_values(interpreted: Run, sizes: Sizes, interleaved: bool) -> None:
    for dtype in DTYPES:
        interpreted(compare, sizes, interleaved, dtype)


def at_fault(old: str, new: str, directory: Path, sizes: Sizes, interleaved: bool) -> None:
    module = proofs.planted(MODULE, old, new, directory)
    with pytest.raises(AssertionError):
        compare(sizes, interleaved, torch.float32, module)


@pytest.mark.parametrize(
    "old, new",
    [
        ("tl.load(rows + place) if GATHERS", "tl.load(rows) if GATHERS"),
        ("cos + token * TURNED + pair, sin", "cos + place * TURNED + pair, sin"),
        ("tl.load(order + first + turn)", "tl.load(order + first)"),
        ("- first if GATHERS else 1", "* 0 + 1 if GATHERS else 1"),
        ("low * c + high * s", "low * c - high * s"),
        ("values + place * heads", "values + place * 0 * heads"),
        ("tl.store(target + rest, passed", "tl.store(target + rest, -passed"),
        ("target + heads * DIMS + whole", "target + whole"),
    ],
)
def test_planted_faults(interpreted: Run, tmp_path: Path, old: str, new: str) -> None:
    interpreted(at_fault, old, new, tmp_path, (5, 5, 96, 24), False)


def figures(name: str, architecture: int, interleaved: bool) -> proofs.Figures:
    """Compile with the sizes of a model of 8 billion parameters."""
    from spmdrl.models.kernels.cuda import laid_out, projected

    halves = ("fused", "keys", "values", "of_keys", "of_values")
    types = {
        **dict.fromkeys(halves, "*bf16"),
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        **dict.fromkeys(("rows", "order"), "*i64"),
        "starts": "*i32",
        **dict.fromkeys(("fused_token", "heads"), "i32"),
    }
    constants = {
        **projected.tile_sizes(0, 8, 128, 128),
        "INTERLEAVED": interleaved,
        "GATHERS": True,
    }
    kernel = getattr(laid_out, name)
    tensors = {n: types[n] for n in kernel.arg_names if n not in constants}
    return proofs.compiled(kernel, architecture, tensors, constants, odd=("heads",))


@pytest.mark.parametrize("architecture", proofs.ARCHITECTURES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", ["lay_out_heads", "collect_heads"])
def test_compiled(name: str, architecture: int, interleaved: bool) -> None:
    # a place's token, or a token's places: their number, and each
    proofs.check(figures(name, architecture, interleaved), most_scalar=3, least_wide=2)
