"""Attention of rows that read shared pages together: against float64, against each row alone to the
last bit, and as compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_decode import (
    CAPPED,
    TENSORS,
    attention_figures,
    counts_after_stores,
    reference,
)
from torch import Tensor

import kernel_proofs as proofs
from spmdrl.models.specs import AttentionOptions
from spmdrl.rollout.native.sharing import find_sharing

MODULE = "spmdrl.models.kernels.cuda.cascade"
Run = Callable[..., Any]
Arguments = tuple[Any, ...]

Groups = list[tuple[int, list[int]]]


def case(
    groups: Groups,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dims: int = 16,
    page: int = 32,
    dtype: torch.dtype = torch.float32,
    options: AttentionOptions | None = None,
    sinks: bool = False,
    common: int = 0,
    size: float = 1.0,
) -> Arguments:
    """Draw the operands of a call, with its rows in any order. Places that no row's keys are in
    hold NaN.

    Args:
        groups: of each group, the pages that its rows share, and the rows' lengths, which may end
            within these pages.
        common: pages with which all rows begin.
    """
    random = torch.Generator().manual_seed(dims + page + len(groups))
    rows = [(i, length) for i, (_, lengths) in enumerate(groups) for length in lengths]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
    most = common + sum(n for n, _ in groups) + sum(length // page + 1 for _, length in rows)
    free = (torch.randperm(most, generator=random) + 1).tolist()  # block 0: all NaN
    first = [free.pop() for _ in range(common)]
    shared = [first + [free.pop() for _ in range(n)] for n, _ in groups]
    keys, values = (
        torch.full((most + 1, page, kv_heads, dims), torch.nan, dtype=dtype) for _ in "kv"
    )
    width = max([length for _, length in rows], default=0) // page + 2
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    for row, (group, length) in enumerate(rows):
        needed = -(-length // page)
        blocks = shared[group][:needed]
        blocks += [free.pop() for _ in range(needed - len(blocks))]
        table[row, :needed] = torch.tensor(blocks, dtype=torch.int32)
        places = torch.arange(length)
        cells = table[row, places // page].long(), places % page
        for cache in (keys, values):
            drawn = torch.randn(length, kv_heads, dims, generator=random).to(dtype)
            held = cache[cells]
            cache[cells] = torch.where(held.isnan(), drawn, held)
    q = (torch.randn(len(rows), heads, dims, generator=random) * size).to(dtype)
    drawn = torch.randn(heads, generator=random) if sinks else None
    given = AttentionOptions(scale=dims**-0.5) if options is None else options
    lengths = torch.tensor([length for _, length in rows], dtype=torch.int32)
    return q, keys, values, table, lengths, given, drawn


def told(arguments: Arguments) -> Tensor:
    """Find who shares, as the engine does."""
    keys, table, lengths = arguments[1], arguments[3], arguments[4]
    prompts = np.zeros(len(table), np.int64)
    found = find_sharing(table.numpy(), lengths.numpy().astype(np.int64), prompts, keys.shape[1])
    return torch.from_numpy(found)


def fewer(sharing: Tensor, random: torch.Generator) -> Tensor:
    """Tell of a part of what rows share: some groups are divided, some shared keys not told."""
    count = sharing.shape[1]
    keys = sharing[2] * torch.randint(0, 4, (count,), generator=random).clamp(max=1)
    keys -= torch.randint(0, 64, (count,), generator=random)
    keys = keys.clamp(min=0) * (sharing[2] > 0)
    after = torch.cat((keys[1:], torch.zeros(1)))
    begin = torch.where(keys == 0, torch.arange(count), 0).cummax(0).values
    return torch.stack((sharing[0], begin, keys, torch.maximum(keys, after))).to(torch.int32)


def together(split: int, most: int = 32, module: Any = None) -> Any:
    """Return the kernels' attention with splits of so many keys, and so many splits."""
    from spmdrl.models.kernels.cuda import cascade, decode

    found = module or cascade
    decode.SPLIT, decode.MOST_SPLITS = split, most
    return found.cascade_attention


def compare(arguments: Arguments, tolerance: float, split: int = 64, attend: Any = None) -> None:
    """Hold the kernels to float64."""
    attend = attend or together(split)
    found = attend(*arguments, sharing=told(arguments))
    assert found.dtype == arguments[0].dtype
    torch.testing.assert_close(
        found.double(), reference(*arguments), rtol=tolerance, atol=tolerance
    )


def alone(arguments: Arguments, split: int, groupings: int, attend: Any = None) -> None:
    """Hold every row to the result that it has alone by `decode_attention`, under a table no wider
    than it needs, in any grouping.
    """
    from spmdrl.models.kernels.cuda.decode import decode_attention

    attend = attend or together(split)
    q, keys, values, table, lengths, *rest = arguments
    owns = []
    for i, length in enumerate(lengths.tolist()):
        width, one = max(1, -(-length // keys.shape[1])), slice(i, i + 1)
        owns += [decode_attention(q[one], keys, values, table[one, :width], lengths[one], *rest)]
    expected, sharing = torch.cat(owns), told(arguments)
    random = torch.Generator().manual_seed(groupings)
    for number in range(groupings):
        given = fewer(sharing, random) if number else sharing
        assert torch.equal(attend(*arguments, sharing=given), expected), given


def read_keys(call: Any, keys: Tensor) -> int:
    """Count the numbers that a call loads from the keys' memory."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain, found = InterpreterBuilder.create_masked_load, 0
    first, last = keys.data_ptr(), keys.data_ptr() + keys.nbytes

    def watching(self: Any, places: Any, mask: Any, *rest: Any) -> Any:
        nonlocal found
        at = places.data
        found += int(((at >= first) & (at < last) & mask.data).sum())
        return plain(self, places, mask, *rest)

    InterpreterBuilder.create_masked_load = watching
    try:
        call()
    finally:
        InterpreterBuilder.create_masked_load = plain
    return found


GROUPS: Groups = [(4, [140, 130, 200]), (3, [150, 110]), (0, [0, 70])]
"""Splits of 64 keys: two that three rows share, one that two share, and pages that are shared but
are not a whole split; rows alone, one of nothing.
"""


def test_lengths(interpreted: Run) -> None:
    """Lengths at both sides of a shared page's and of a shared split's end, and within them."""
    interpreted(compare, case(GROUPS, kv_heads=1, heads=2), 2e-6)
    edges = [63, 64, 65, 127, 128, 129]
    interpreted(compare, case([(4, edges)], kv_heads=1, heads=2), 2e-6)
    for groups in ([], [(0, [0, 0])], [(1, [1])]):
        interpreted(compare, case(groups, kv_heads=1, heads=2), 2e-6)


WINDOWS = [AttentionOptions(scale=0.25, window=n) for n in (1, 100, 250, 5000)]
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
    arguments = case([(8, [280, 270, 400])], heads=2, kv_heads=1, options=options, sinks=sinks)
    interpreted(compare, arguments, 5e-6)
    interpreted(alone, arguments, 64, 2)


HEADS = [(7, 1), *(pytest.param(*n, marks=pytest.mark.full) for n in ((28, 4), (1, 1), (20, 1)))]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_groups_of_more_rows_than_a_program_has(
    interpreted: Run, heads: int, kv_heads: int
) -> None:
    lengths = [65 + i for i in range(70 if heads == 1 else 11)]
    interpreted(compare, case([(2, lengths)], heads=heads, kv_heads=kv_heads), 2e-6)


@pytest.mark.parametrize(
    "dims, page, dtype",
    [
        (128, 256, torch.bfloat16),
        pytest.param(80, 16, torch.float32, marks=pytest.mark.full),
        pytest.param(256, 64, torch.float16, marks=pytest.mark.full),
    ],
)
def test_sizes(interpreted: Run, dims: int, page: int, dtype: torch.dtype) -> None:
    arguments = case(
        [(512 // page, [513, 530, 700])], dims=dims, page=page, dtype=dtype, heads=2, kv_heads=1
    )
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    interpreted(compare, arguments, tolerance, 256)
    interpreted(alone, arguments, 256, 2)


@pytest.mark.parametrize("groupings", [3, pytest.param(100, marks=pytest.mark.full)])
def test_a_row_does_not_depend_on_who_reads(interpreted: Run, groupings: int) -> None:
    """Rows of two prompts with the same first pages, in groupings drawn at random."""
    groups: Groups = [(2, [140, 130, 170]), (2, [150, 135]), (0, [40])]
    arguments = case(groups, common=2, kv_heads=1, sinks=True, dtype=torch.bfloat16)
    interpreted(alone, arguments, 64, groupings)


def few_splits(attend: Any = None) -> None:
    """Rows of more keys than `MOST_SPLITS` splits have longer ones, and share with their like."""
    arguments = case([(8, [127, 128, 129, 250, 256, 257, 400])], kv_heads=1, heads=2)
    attend = attend or together(64, 2)
    compare(arguments, 2e-6, attend=attend)
    alone(arguments, 64, 2, attend)


def test_long_rows(interpreted: Run) -> None:
    interpreted(few_splits)


@contextmanager
def last_first() -> Iterator[None]:
    """Interpret the programs of a launch from the last to the first."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.set_grid_idx

    def turned(self: Any, *place: int) -> None:
        plain(self, *(n - 1 - i for n, i in zip(self.grid_dim, place, strict=True)))

    InterpreterBuilder.set_grid_idx = turned
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = plain


def share_counters(attend: Any = None) -> None:
    """Call twice with the same counters, with shared splits first and last of a row's."""
    attend = attend or together(64)
    arguments = case(GROUPS, kv_heads=1, heads=2, sinks=True)
    counters = torch.zeros(len(arguments[0]), dtype=torch.int32)
    for order in (nullcontext(), last_first()):
        with order:
            compare(arguments, 2e-6, attend=partial(attend, counters=counters))
        assert not counters.any()


def test_counters_are_zero_again(interpreted: Run) -> None:
    interpreted(share_counters)


def reads(groups: Groups, heads: int, kv_heads: int) -> tuple[int, int]:
    """Count the keys that are read by each row for itself, and together."""
    from spmdrl.models.kernels.cuda.decode import decode_attention

    attend, arguments = together(64), case(groups, heads=heads, kv_heads=kv_heads)
    keys, sharing = arguments[1], told(arguments)
    one = read_keys(partial(decode_attention, *arguments), keys)
    all_of = read_keys(partial(attend, *arguments, sharing=sharing), keys)
    return one // keys[0, 0].numel(), all_of // keys[0, 0].numel()


def test_shared_keys_are_read_once(interpreted: Run) -> None:
    """Eight rows with 128 keys in common, and with them once more as many groups."""
    lengths = [130 + 10 * i for i in range(8)]
    own = sum(lengths) - 8 * 128
    for heads, programs in ((2, 1), (7, 2), (16, 4)):  # the last has tiles of one row
        found = interpreted(reads, [(4, lengths)], heads, 1)
        assert found == (sum(lengths), own + 128 * programs), (heads, found)
    assert interpreted(reads, [(4, lengths)] * 2, 2, 1) == (2 * sum(lengths), 2 * (own + 128))


def test_rows_alone_read_what_they_read_without(interpreted: Run) -> None:
    one, together = interpreted(reads, [(0, [70, 200]), (0, [10])], 2, 1)
    assert one == together == 280


def at_fault(old: str, new: str, directory: Path, check: Any, *arguments: Any) -> None:
    """Hold kernels with a planted fault to a check, which must fail."""
    module = proofs.planted(MODULE, old, new, directory)
    attend = together(64, 2 if check is few_splits else 32, module)
    with pytest.raises(AssertionError):
        check(*arguments, attend=attend)


@pytest.mark.parametrize(
    "old, new",
    [
        (" & (stop <= same)", ""),  # a row reads its neighbour's own pages
        ("tl.load(sharing + place).to(tl.int64) * table_row", "(place + 1) * table_row"),
        ("tl.where(is_led > 0, 0, end - place)", "end - place"),  # a split is counted twice
        ("(own < count)", "(own < count - 1)"),  # the last row is left out
        ("member // GROUP\n", "0 * member\n"),  # a row's queries for another's
        ("ended, 0), 0) == high - low - 1", "ended, 0), 0) == high - low - 2"),
        ("tl.load(sharing + place + own)", "tl.load(sharing + place)"),
    ],
)
def test_planted_faults(interpreted: Run, tmp_path: Path, old: str, new: str) -> None:
    interpreted(at_fault, old, new, tmp_path, share_counters)


def test_a_planted_share_of_splits_with_other_ends(interpreted: Run, tmp_path: Path) -> None:
    interpreted(at_fault, "(span == other_span) & ", "", tmp_path, few_splits)


def test_a_planted_share_beyond_windows(interpreted: Run, tmp_path: Path) -> None:
    arguments = case([(8, [280, 270, 400])], heads=2, kv_heads=1, options=WINDOWS[2])
    old, new = "(first <= start) & ", ""
    interpreted(at_fault, old, new, tmp_path, compare, arguments, 1e-4, 64)


def test_a_planted_tile_that_depends_on_others(interpreted: Run, tmp_path: Path) -> None:
    """A row whose keys are read together is summed in another order."""
    old, new = "(start * 0, start, stop)", "(start * 0, start, stop - 32)"
    arguments = case([(2, [65, 130, 140])], heads=2, kv_heads=1)
    interpreted(at_fault, old, new, tmp_path, alone, arguments, 64, 1)


def figures(
    architecture: int,
    *,
    dims: int = 128,
    group: int = 4,
    options: AttentionOptions | None = None,
    module: Any = None,
    **changed: Any,
) -> proofs.Figures:
    from spmdrl.models.kernels.cuda import cascade

    given = AttentionOptions(scale=1.0) if options is None else options
    constants = {
        "HAS_SINKS": True,
        "PAGE": 256,
        "WINDOW": given.window or 0,
        "CAPPED": given.softcap is not None,
        **cascade.sizes_together(group, dims),
    }
    return proofs.compiled(
        (module or cascade).attend_together,
        architecture,
        TENSORS | {"sharing": "*i32", "sharing_row": "i32"},
        constants | changed,
        odd=("table_row", "sharing_row"),
        fusion=False,
    )


def check(found: proofs.Figures) -> None:
    # twice those of a row alone, and who shares, for each of a program's places
    proofs.check(found, most_scalar=80, least_wide=16)


def test_compiled_attention() -> None:
    found = figures(90)
    check(found)
    assert counts_after_stores(found.ptx, 2)
    # a thread holds the same places of the same tiles, and so sums in the same order, as alone
    own = attention_figures(90, page=256)
    assert len(found.products) == 1 and found.products == own.products


@pytest.mark.full
@pytest.mark.parametrize("architecture", proofs.ARCHITECTURES)
@pytest.mark.parametrize("dims", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 20])
def test_compiled_attention_of_all_sizes(architecture: int, dims: int, group: int) -> None:
    for options in (AttentionOptions(scale=1.0), replace(CAPPED, window=1024)):
        found = figures(architecture, dims=dims, group=group, options=options)
        check(found)
        own = attention_figures(architecture, dims=dims, page=256, group=group, options=options)
        assert len(found.products) == 1 and found.products == own.products


@pytest.mark.full
def test_a_planted_count_before_the_stores_of_others(tmp_path: Path) -> None:
    old, new = 'sem="acq_rel"', 'sem="relaxed"'
    module = proofs.planted(MODULE, old, new, tmp_path)
    assert not counts_after_stores(figures(90, module=module).ptx, 2)


@pytest.mark.full
def test_a_planted_spill() -> None:
    with pytest.raises(AssertionError, match="registers do not suffice"):
        check(figures(90, TILES=8, PLACES=32))
