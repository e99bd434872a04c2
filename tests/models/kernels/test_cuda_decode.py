"""Attention of decode steps in Triton: against float64, row by row, and as compiled code."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_proofs as proofs
from spmdrl.models.specs import AttentionOptions

MODULE = "spmdrl.models.kernels.cuda.decode"
Run = Callable[..., Any]


def reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    options: AttentionOptions,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in float64, row by row."""
    rows, heads, dims = q.shape
    block_size, group = keys.shape[1], heads // keys.shape[2]
    out = torch.zeros(rows, heads, dims, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        if not length:
            continue
        first = 0 if options.window is None else max(0, length - options.window)
        places = torch.arange(first, length)
        blocks = table[row, places // block_size].long()
        k, v = (x[blocks, places % block_size].double() for x in (keys, values))
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("hd,jhd->hj", q[row].double(), k) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
        weights = scores.softmax(1)[:, : length - first]
        out[row] = torch.einsum("hj,jhd->hd", weights, v)
    return out


def case(
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dims: int = 64,
    page: int = 16,
    dtype: torch.dtype = torch.float32,
    options: AttentionOptions | None = None,
    sinks: bool = False,
    size: float = 1.0,
) -> tuple[Any, ...]:
    """Draw the operands of a call. Places that no row's keys are in hold NaN."""
    random = torch.Generator().manual_seed(len(lengths) + dims + page)
    used = [-(-n // page) for n in lengths]
    order = (torch.randperm(sum(used), generator=random) + 1).tolist()
    keys, values = (
        torch.full((sum(used) + 1, page, kv_heads, dims), torch.nan, dtype=dtype) for _ in "kv"
    )
    table = torch.zeros(len(lengths), max([*used, 1]) + 1, dtype=torch.int32)  # block 0: all NaN
    for row, length in enumerate(lengths):
        blocks = [order.pop() for _ in range(used[row])]
        table[row, : used[row]] = torch.tensor(blocks, dtype=torch.int32)
        for place in range(length):
            block = blocks[place // page]
            for cache in (keys, values):
                drawn = torch.randn(kv_heads, dims, generator=random)
                cache[block, place % page] = drawn.to(dtype)
    # queries are a part of the fused projection's rows
    fused = torch.randn(len(lengths), heads + 2 * kv_heads, dims, generator=random) * size
    q = fused.to(dtype)[:, :heads]
    drawn = torch.randn(heads, generator=random) if sinks else None
    counts = torch.tensor(lengths, dtype=torch.int32)
    given = AttentionOptions(scale=dims**-0.5) if options is None else options
    return q, keys, values, table, counts, given, drawn


def compare(arguments: tuple[Any, ...], tolerance: float, attend: Any = None) -> None:
    """Hold the kernels to float64; what float32 misses is relative to the size of values, 1."""
    if attend is None:
        from spmdrl.models.kernels.cuda.decode import decode_attention as attend
    found = attend(*arguments)
    assert found.dtype == arguments[0].dtype
    torch.testing.assert_close(
        found.double(), reference(*arguments), rtol=tolerance, atol=tolerance
    )


LENGTHS = [0, 1, 15, 16, 17, 255, 256, 257, 600]
"""None, one, and both sides of a page's and a split's end."""

WINDOWS = [AttentionOptions(scale=0.125, window=n) for n in (1, 16, 100, 300, 5000)]
CAPPED = AttentionOptions(scale=0.5, softcap=5.0)


def test_lengths(interpreted: Run) -> None:
    for lengths in (LENGTHS, [1], [0, 0], []):
        interpreted(compare, case(lengths), 2e-6)


OPTIONS = [
    (CAPPED, True),
    (WINDOWS[2], True),
    *(
        pytest.param(options, sinks, marks=pytest.mark.full)
        for options in (None, CAPPED, *WINDOWS)
        for sinks in (False, True)
    ),
]


@pytest.mark.parametrize("options, sinks", OPTIONS, ids=str)
def test_options(interpreted: Run, options: AttentionOptions | None, sinks: bool) -> None:
    interpreted(compare, case([0, 1, 17, 300, 400], options=options, sinks=sinks), 5e-6)


def full(*values: int) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


HEADS = [(28, 4), full(2, 2), full(6, 1), full(16, 1), full(20, 1)]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_groups(interpreted: Run, heads: int, kv_heads: int) -> None:
    interpreted(compare, case([5, 70], heads=heads, kv_heads=kv_heads), 2e-6)


SIZES = [(80, 32), (256, 16), *(full(d, page) for d in (8, 96, 128, 256) for page in (16, 32, 256))]


@pytest.mark.parametrize("dims, page", SIZES)
def test_sizes(interpreted: Run, dims: int, page: int) -> None:
    interpreted(compare, case([1, 33, 290], dims=dims, page=page), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(interpreted: Run, dtype: torch.dtype) -> None:
    # the result's rounding, and that of the weights before their product
    tolerance = 2 * torch.finfo(dtype).eps
    interpreted(compare, case([1, 17, 290], dims=128, dtype=dtype), tolerance)
    interpreted(compare, case([300, 2], dtype=dtype, options=CAPPED, sinks=True), tolerance)


def test_large_scores(interpreted: Run) -> None:
    """Scores of some thousands: one key has all the weight."""
    for options in (None, CAPPED):
        interpreted(compare, case([3, 600], size=1e3, options=options, sinks=True), 2e-4)


def alone(arguments: tuple[Any, ...], attend: Any = None) -> None:
    """Hold every row to the result that it has alone, under a table no wider than it needs."""
    if attend is None:
        from spmdrl.models.kernels.cuda.decode import decode_attention as attend
    q, keys, values, table, lengths, *rest = arguments
    together = attend(*arguments)
    for i, length in enumerate(lengths.tolist()):
        width = max(1, -(-length // keys.shape[1]))
        one = slice(i, i + 1)
        own = attend(q[one], keys, values, table[one, :width], lengths[one], *rest)
        assert torch.equal(own[0], together[i]), i


def test_a_row_does_not_depend_on_others(interpreted: Run) -> None:
    interpreted(alone, case([1, 16, 257]))
    interpreted(alone, case([300, 40, 520], dtype=torch.bfloat16, options=WINDOWS[3], sinks=True))


def few_splits(directory: Path) -> None:
    """Rows of more keys than `MOST_SPLITS` splits have longer ones."""
    module = proofs.planted(MODULE, "MOST_SPLITS = 32", "MOST_SPLITS = 2", directory)
    for options in (None, WINDOWS[3]):
        arguments = case([1, 512, 513, 1100], heads=2, kv_heads=1, options=options)
        compare(arguments, 2e-6, module.decode_attention)
    alone(arguments, module.decode_attention)


def test_long_rows(interpreted: Run, tmp_path: Path) -> None:
    interpreted(few_splits, tmp_path)


def share_counters(attend: Any = None) -> None:
    """Call twice with the same counters."""
    if attend is None:
        from spmdrl.models.kernels.cuda.decode import decode_attention as attend
    arguments = case([300, 1, 0, 600], sinks=True)
    counters = torch.zeros(4 * 2, dtype=torch.int32)
    for _ in range(2):
        compare(arguments, 2e-6, partial(attend, counters=counters))
        assert not counters.any()


def test_counters_are_zero_again(interpreted: Run) -> None:
    interpreted(share_counters)


def at_fault(old: str, new: str, directory: Path, check: Any, *arguments: Any) -> None:
    """Hold kernels with a planted fault to a check, which must fail."""
    attend = proofs.planted(MODULE, old, new, directory).decode_attention
    with pytest.raises(AssertionError):
        check(*arguments, attend)


def test_a_planted_count_that_stays(interpreted: Run, tmp_path: Path) -> None:
    old, new = "tl.store(counter, 0)", "tl.store(counter, 1)"
    interpreted(at_fault, old, new, tmp_path, share_counters)


@pytest.mark.parametrize(
    "old, new",
    [
        ("row * table_row", "(row + 1) % 2 * table_row"),  # the neighbour's page
        ("(place < stop)", "(place <= stop)"),
        ("length - WINDOW,", "length - WINDOW - 1,"),
        ("for other in range(low, high)", "for other in range(low, high - 1)"),
        ("whole + 1.0", "whole + 0.0"),
    ],
)
def test_planted_faults_of_values(interpreted: Run, tmp_path: Path, old: str, new: str) -> None:
    arguments = case([300, 290], options=WINDOWS[2], sinks=True)
    interpreted(at_fault, old, new, tmp_path, compare, arguments, 1e-4)


def test_a_planted_dependence_on_other_rows(interpreted: Run, tmp_path: Path) -> None:
    """Splits that follow the table's width round otherwise in another batch."""
    old = "    rows, heads, dims = q.shape\n"
    new = f"    global SPLIT\n    SPLIT = 64 if table.shape[1] < 34 else 256\n{old}"
    interpreted(at_fault, old, new, tmp_path, alone, case([40, 520]))


TENSORS = {
    **dict.fromkeys(("q", "keys", "values", "sinks", "out"), "*bf16"),
    **dict.fromkeys(("table", "lengths", "counters"), "*i32"),
    **dict.fromkeys(("parts", "sums"), "*fp32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
    **dict.fromkeys(("q_row", "block_stride", "token_stride", "head_stride"), "i32"),
    "table_row": "i32",
}


def attention_figures(
    architecture: int,
    *,
    dims: int = 128,
    page: int = 16,
    group: int = 4,
    options: AttentionOptions | None = None,
    module: Any = None,
    **changed: Any,
) -> proofs.Figures:
    from spmdrl.models.kernels.cuda import decode

    given = AttentionOptions(scale=1.0) if options is None else options
    constants = {
        "HAS_SINKS": True,
        "PAGE": page,
        "WINDOW": given.window or 0,
        "CAPPED": given.softcap is not None,
        **decode.sizes(group, dims),
    }
    # the table's rows are as long as the longest sample's
    return proofs.compiled(
        (module or decode).attend_split,
        architecture,
        TENSORS,
        constants | changed,
        odd=("table_row",),
        fusion=False,
    )


def check_attention(found: proofs.Figures) -> None:
    # keys and values of a tile are read by 16 bytes; page numbers, lengths, sinks and the sums of
    # splits are single numbers
    proofs.check(found, most_scalar=20, least_wide=8)


def test_compiled_attention() -> None:
    check_attention(attention_figures(90))


@pytest.mark.full
@pytest.mark.parametrize("architecture", proofs.ARCHITECTURES)
@pytest.mark.parametrize("dims", [64, 128, 256])
@pytest.mark.parametrize("page", [16, 256])
def test_compiled_attention_of_all_sizes(architecture: int, dims: int, page: int) -> None:
    for options in (AttentionOptions(scale=1.0), replace(CAPPED, window=1024)):
        found = attention_figures(architecture, dims=dims, page=page, group=7, options=options)
        check_attention(found)


def counts_after_stores(ptx: str, number: int = 1) -> bool:
    """Whether all threads meet between a split's stores and its count, which orders them, and
    nothing is stored between the count and what is done with it.

    Args:
        number: places in the code where splits are counted.
    """
    counts = [m.start() for m in re.finditer(r"atom\.\S*acq_rel\S*gpu|atom\.\S*gpu\S*acq_rel", ptx)]
    if len(counts) != number:
        return False
    for count in counts:
        before = ptx[ptx.rindex("st.global", 0, count) : count]
        after = ptx[count : ptx.index("$L__BB", count)]
        if re.search(r"\bbar(rier)?\.sync", before) is None or "st.global" in after:
            return False
    return True


COUNT = """        tl.debug_barrier()
        ended = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
"""
STORE = "        tl.store(parts + split * DIMS, acc / total[:, None], mask=mine)\n"
REASON = (
    "        # every thread's stores come before the count, and the count before the loads below\n"
)


def test_a_split_is_stored_before_it_is_counted(tmp_path: Path) -> None:
    assert counts_after_stores(attention_figures(90).ptx)
    order, late = STORE + REASON + COUNT, COUNT + STORE
    # Triton's compiler itself lets threads meet before a count that orders memory
    for old, new in ((order, late), ('sem="acq_rel"', 'sem="relaxed"')):
        module = proofs.planted(MODULE, old, new, tmp_path)
        assert not counts_after_stores(attention_figures(90, module=module).ptx), new


def test_a_planted_spill() -> None:
    with pytest.raises(AssertionError, match="registers do not suffice"):
        check_attention(attention_figures(90, dims=256, TILE=128, HEADS=64))


def test_planted_scalar_loads(tmp_path: Path) -> None:
    old, new = "values + key[:, None] + dim", "values + key[:, None] + 3 * dim"
    module = proofs.planted(MODULE, old, new, tmp_path)
    with pytest.raises(AssertionError, match="scalar loads"):
        check_attention(attention_figures(90, module=module))
