"""What the world agrees on: sums, moments, tables, objects."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from harness import run_ranks
from spmdrl.config.user_objects import AgreedError
from spmdrl.distributed.reduce import (
    OtherRankFailed,
    agreed,
    broadcast_object,
    gather_objects,
    gather_tables,
    group_sums,
    moments,
    world_any,
    world_max,
    world_sum,
)
from spmdrl.supervision.failures import is_lost_peer
from spmdrl.world import World


def uneven_parts(size: int) -> list[torch.Tensor]:
    """Values with a large mean, of which rank 1 has none."""
    generator = torch.Generator().manual_seed(0)
    counts = [5, 0, 3, 8][:size]
    return [torch.randn(n, 2, generator=generator, dtype=torch.float64) + 1e6 for n in counts]


def moments_of(world: World) -> list[Any]:
    values = uneven_parts(world.size)[world.rank]
    mask = values[:, 0] > 1e6
    return [
        moments(values),
        moments(values[:, 0], mask),
        moments(values[:0]),
        moments(values.flatten(), torch.zeros(values.numel(), dtype=torch.bool)),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_moments_equal_numpy_on_uneven_and_empty_ranks(world_size: int) -> None:
    values = torch.cat(uneven_parts(world_size)).numpy()
    expected = [values, values[values[:, 0] > 1e6][:, 0]]
    for results in run_ranks(moments_of, world_size):
        for got, numbers in zip(results[:2], expected, strict=True):
            assert got.count == numbers.size
            # two passes: a mean of 1e6 costs the standard deviation no digits
            np.testing.assert_allclose(
                [got.mean, got.std, got.minimum, got.maximum],
                [numbers.mean(), numbers.std(), numbers.min(), numbers.max()],
                rtol=1e-14 if world_size == 1 else 1e-12,
            )
        for empty in results[2:]:
            assert (empty.count, empty.mean, empty.std) == (0, 0, 0)


def agreements(world: World) -> dict[str, Any]:
    rank, size = world.rank, world.size
    warnings.simplefilter("error", FutureWarning)  # a rank's log is not for torch's renamings
    table = torch.full((rank, 2), float(rank))
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    return {
        "tables": [t.tolist() for t in gather_tables(table)],
        "empty": [t.shape for t in gather_tables(torch.zeros(0, 3, dtype=torch.int64))],
        "objects": gather_objects({"rank": rank}),
        "from_last": broadcast_object([rank], size - 1),
        # a sum that float32 cannot hold
        "sum": world_sum(torch.tensor([2.0**24, 1.0])).tolist(),
        "max": world_max(torch.tensor([-1.0 - rank, rank])).tolist(),
        "any": [world_any(rank == 1), world_any(False)],
        "alone": group_sums([0.5], None),
        "group": group_sums([rank + 1, 2.0], pairs[0]) if rank < 2 else None,
    }


def test_every_rank_gets_the_same_answers() -> None:
    results = run_ranks(agreements, 3)
    groups = [result.pop("group") for result in results]
    assert groups == [[3, 4], [3, 4], None]
    assert (
        results
        == [
            {
                "tables": [[], [[1, 1]], [[2, 2], [2, 2]]],
                "empty": [(0, 3)] * 3,
                "objects": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
                "from_last": [2],
                "sum": [3 * 2.0**24, 3],
                "max": [-1, 2],
                "any": [True, False],
                "alone": [0.5],
            }
        ]
        * 3
    )


def part_ways(world: World) -> str:
    table = torch.zeros(3, 2, dtype=torch.int64)
    try:
        if world.rank == 0:
            gather_tables(table)
        else:
            moments(torch.tensor([0.3, -7.5]))
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_in_different_collectives_are_told() -> None:
    texts = run_ranks(part_ways, 2)
    assert "must be called by every rank" in texts[0]


def disagree(world: World) -> list[tuple[type, str, bool]]:
    """One rank meets an error of the kind that is foreseen, of another, or both kinds come."""
    cases: list[dict[int, Exception]] = [
        {},
        {1: ValueError("no such file")},
        {1: KeyError("rng/python")},
        {0: ValueError("no such file"), 2: KeyError("rng/python")},
        {rank: ValueError("a typo") for rank in range(3)},
    ]
    seen: list[tuple[type, str, bool]] = []
    for case in cases:

        def act(case: dict[int, Exception] = case) -> int:
            if world.rank in case:
                raise case[world.rank]
            return world.rank

        try:
            assert agreed(ValueError, act) == world.rank
        except Exception as error:
            seen.append((type(error), str(error), is_lost_peer(error)))
    return seen


def test_what_nobody_foresaw_on_one_rank_ends_the_others_too() -> None:
    found = run_ranks(disagree, 3)
    known = (AgreedError, "rank 1: no such file", False)
    other = "rank {}: KeyError: 'rng/python'"
    for rank in range(3):
        assert found[rank][0] == known
    assert [found[r][1] for r in (0, 2)] == [(OtherRankFailed, other.format(1), True)] * 2
    assert found[1][1] == (KeyError, "'rng/python'", False)  # with its own traceback
    assert found[0][2] == found[1][2] == (OtherRankFailed, other.format(2), True)
    assert found[2][2][0] is KeyError
    assert [found[rank][3] for rank in range(3)] == [(AgreedError, "a typo", False)] * 3
