"""Sums of tensors do not depend on how they are cut, and see any change."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spmdrl.weights.cells import Cell
from spmdrl.weights.tensor_sums import row_weights, tensor_sum

SHAPES = [(1,), (7,), (5, 8), (6, 7), (1, 9), (4, 3, 8), (3, 2, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sum_of(values: Tensor, dtype: torch.dtype, *starts: int) -> int:
    """Of values that lie at `starts` of their tensor; one without `starts` is whole."""
    start = starts or (0,) * values.dim()
    stop = tuple(a + n for a, n in zip(start, values.shape, strict=True))
    return int(tensor_sum(values, Cell(start, stop, dtype, (), ())))


def wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_parts_add_up_however_a_tensor_is_cut(
    shape: tuple[int, ...], dtype: torch.dtype, wide: bool, seed: int, data: st.DataObject
) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    # a target may be wider than what travels
    held = whole.to(torch.float64) if wide else whole
    cuts = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape
    ]
    total = 0
    for ranges in product(*(list(pairwise(bounds)) for bounds in cuts)):
        view = held[tuple(slice(a, b) for a, b in ranges)]
        # as the part of a larger tensor, or a tensor of its own
        values = view.contiguous() if data.draw(st.booleans()) else view
        total += sum_of(values, dtype, *(a for a, _ in ranges))
    assert wrapped(total) == sum_of(whole, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_change_is_seen(dtype: torch.dtype) -> None:
    values = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    one, pair, rows = values.clone(), values.clone(), values.clone()
    one.view(bits)[3, 5] += 1  # the last digit
    pair.view(bits)[3, 5] += 1
    pair.view(bits)[9, 5] -= 1  # and another one the other way
    rows[[1, 2]] = values[[2, 1]]
    sums = {sum_of(tensor, dtype) for tensor in (values, one, pair, rows)}
    assert len(sums) == 4
    stack = values.view(8, 8, 24)
    inner, outer, both = stack.clone(), stack.clone(), stack.transpose(0, 1).contiguous()
    inner[:, [1, 2]] = stack[:, [2, 1]]
    outer[[1, 2]] = stack[[2, 1]]
    assert len({sum_of(tensor, dtype) for tensor in (stack, inner, outer, both)}) == 4
    vector = values[:, 0].clone()
    assert sum_of(vector, dtype) != sum_of(vector.flip(0), dtype)


def test_weights_of_rows_are_odd_and_do_not_depend_on_where_they_begin() -> None:
    weights = row_weights(0, 100_000, torch.device("cpu"))
    assert bool((weights % 2 == 1).all()) and len(set(weights.tolist())) == 100_000
    assert torch.equal(row_weights(77, 1000, torch.device("cpu")), weights[77:1077])
    # half of the bits are set
    assert abs(sum(bin(w % 2**64).count("1") for w in weights.tolist()) / 100_000 - 32.5) < 0.1
