"""Norms of heads, rope and the cache's write in Triton: against torch in float64,
and as compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_proofs as proofs
from spmdrl.models import rope

MODULE = "spmdrl.models.kernels.cuda.projected"
PAGE = 4
Run = Callable[..., Any]


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def compare(
    heads: int,
    kv_heads: int,
    dims: int,
    turned: int,
    options: tuple[bool, bool, bool],
    dtype: torch.dtype = torch.float32,
    module: Any = None,
) -> None:
    """Hold queries, written places and the rest of the cache to their definition.

    Args:
        options: whether heads are normed, by 1 + weight, and pairs are of neighbours.
    """
    if module is None:
        from spmdrl.models.kernels.cuda import projected as module
    norms, one_plus, interleaved = options
    random = torch.Generator().manual_seed(heads + dims + turned)
    tokens = 5
    wide = torch.randn(tokens, heads + 2 * kv_heads + 1, dims, generator=random).to(dtype)
    fused = wide[:, : heads + 2 * kv_heads]  # with a gap behind each token
    keys, values = (torch.full((4, PAGE, kv_heads, dims), 7.0, dtype=dtype) for _ in "kv")
    slots = torch.randperm(4 * PAGE, generator=random)[:tokens]
    weights = [torch.randn(dims, generator=random).to(dtype) for _ in "qk"]
    tables: tuple[Tensor, ...] = ()
    words: dict[str, Any] = {"interleaved": interleaved}
    if turned:
        frequencies = 10000.0 ** -(torch.arange(turned // 2) / 8)
        tables = rope.rope_tables(torch.arange(tokens) * 7, frequencies, 1.5)
        words |= {"cos": tables[0], "sin": tables[1]}
    if norms:
        words |= {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-3}
        words["one_plus"] = one_plus
    q = module.turn_and_store(fused, slots, keys, values, **words)
    assert q.dtype == dtype and q.is_contiguous()
    expected, k, v = fused.double().split([heads, kv_heads, kv_heads], dim=1)
    if norms:
        plus = 1.0 if one_plus else 0.0
        expected, k = (
            head_norm(x, w.double() + plus, 1e-3)
            for x, w in zip((expected, k), weights, strict=True)
        )
    if turned:
        expected, k = (
            rope.rotate(x, *(t.double() for t in tables), interleaved) for x in (expected, k)
        )
    tolerance = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for found, wanted in ((q, expected), (keys.flatten(0, 1)[slots], k)):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(values.flatten(0, 1)[slots].double(), v)
    others = torch.ones(4 * PAGE, dtype=torch.bool).index_fill(0, slots, False)
    for cache in (keys, values):
        assert (cache.flatten(0, 1)[others] == 7).all(), "a place of no token is written"


PLAIN, NORMED = (False, False, False), (True, False, False)
OPTIONS = [
    PLAIN,
    NORMED,
    *(
        pytest.param(each, marks=pytest.mark.full)
        for each in ((True, True, False), (False, False, True), (True, True, True))
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_heads(interpreted: Run, options: tuple[bool, bool, bool]) -> None:
    interpreted(compare, 3, 1, 24, 16, options)


@pytest.mark.full
@pytest.mark.parametrize("options", [PLAIN, NORMED, (True, True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes(interpreted: Run, options: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    sizes = [
        (4, 2, 64, 64),
        (28, 4, 128, 128),
        (1, 1, 80, 80),
        (20, 20, 96, 24),
        (8, 2, 256, 0),
        (5, 1, 10, 6),
    ]
    for each in sizes:
        interpreted(compare, *each, options, dtype)


def at_fault(old: str, new: str, directory: Path, arguments: tuple[Any, ...]) -> None:
    module = proofs.planted(MODULE, old, new, directory)
    with pytest.raises(AssertionError):
        compare(*arguments, module=module)


@pytest.mark.parametrize(
    "old, new, arguments",
    [
        ("tl.load(slots + token)", "tl.load(slots + token) ^ 1", (4, 2, 16, 16, PLAIN)),
        ("token * TURNED", "0 * TURNED", (4, 2, 16, 16, PLAIN)),
        ("of_query, of_key)", "of_key, of_query)", (4, 2, 16, 16, NORMED)),
        ("/ DIMS + eps", "/ WHOLE + eps", (3, 1, 24, 16, NORMED)),
        ("slot * kv_heads + head - heads", "slot * kv_heads + 0 * head", (4, 2, 16, 16, PLAIN)),
        ("sin + token * TURNED + HALF", "sin + token * TURNED", (4, 2, 16, 16, PLAIN)),
    ],
)
def test_planted_faults(
    interpreted: Run, tmp_path: Path, old: str, new: str, arguments: tuple[Any, ...]
) -> None:
    interpreted(at_fault, old, new, tmp_path, arguments)


def figures(
    architecture: int,
    heads: tuple[int, int] = (32, 8),
    dims: int = 128,
    turned: int = 128,
    *,
    normed: bool = True,
    interleaved: bool = False,
    module: Any = None,
) -> proofs.Figures:
    from spmdrl.models.kernels.cuda import projected

    halves = ("fused", "q_weight", "k_weight", "keys", "values", "out")
    tensors = {
        **dict.fromkeys(halves, "*bf16"),
        "slots": "*i64",
        **dict.fromkeys(("cos", "sin"), "*fp32"),
        "eps": "fp32",
        **dict.fromkeys(("fused_token", "heads", "kv_heads"), "i32"),
    }
    constants = {
        **projected.tile_sizes(*heads, dims, turned),
        "NORMS": normed,
        "ONE_PLUS": False,
        "INTERLEAVED": interleaved,
    }
    odd = ("heads", "kv_heads")
    kernel = (module or projected).turn_and_store_heads
    return proofs.compiled(kernel, architecture, tensors, constants, odd=odd)


def check_heads(found: proofs.Figures) -> None:
    # the slot, and the norms' weights, of which a program has one number a dim
    proofs.check(found, most_scalar=8, least_wide=2)


def test_compiled_heads() -> None:
    check_heads(figures(90))


@pytest.mark.full
@pytest.mark.parametrize("architecture", proofs.ARCHITECTURES)
def test_compiled_heads_of_all_architectures(architecture: int) -> None:
    for words in ({}, {"normed": False}, {"dims": 64, "turned": 64}, {"dims": 256, "turned": 64}):
        check_heads(figures(architecture, **words))
    check_heads(figures(architecture, (12, 2), interleaved=True))


def test_planted_scalar_loads(tmp_path: Path) -> None:
    old, new = (
        "tl.load(source + dim, mask=exists & (dim < DIMS)",
        "tl.load(source + (dim ^ 1), mask=exists & (dim < DIMS)",
    )
    module = proofs.planted(MODULE, old, new, tmp_path)
    with pytest.raises(AssertionError, match="scalar loads"):
        check_heads(figures(90, module=module))
