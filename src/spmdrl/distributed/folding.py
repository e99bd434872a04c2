"""Fold of a layout into fewer ranks, by which any configuration runs on the ranks that there are.

Relations stay as far as there are ranks: roles on the same, on disjoint or on overlapping ranks
remain so, and a degree becomes a divisor of itself, so that it divides the model as before. Batches
do not change; replicas are fewer, and each computes more microbatches. Pure functions of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

TINY_LIMITS: Mapping[str, int] = {"tp": 2, "pp": 2, "ep": 8}
"""Key/value heads, layers and experts of a tiny model (`models.config.tiny`), by the axis that
divides them.
"""


def fold_ranks(
    placements: Mapping[str, Sequence[int]], world_size: int
) -> dict[str, tuple[int, ...]]:
    """Map the ranks of every role in another world to ranks of a world of `world_size`.

    Ranks that serve the same roles form a cell. Every cell keeps at least one rank of its own while
    there are enough, so that roles on disjoint ranks stay disjoint; further ranks go to the cell
    with the most original ranks per rank. No cell gets more ranks than it had.
    """
    cells: dict[frozenset[str], int] = {}
    for rank in sorted({rank for ranks in placements.values() for rank in ranks}):
        roles = frozenset(name for name, ranks in placements.items() if rank in ranks)
        cells[roles] = cells.get(roles, 0) + 1
    room = dict(zip(cells, _share_out(list(cells.values()), world_size), strict=True))
    return {
        name: tuple(sorted({r for roles, own in room.items() if name in roles for r in own}))
        for name in placements
    }


def _share_out(sizes: Sequence[int], world_size: int) -> list[range]:
    """A range of ranks for each cell; cells share ranks only if there are more cells than ranks."""
    if len(sizes) >= world_size:
        places = [i * world_size // len(sizes) for i in range(len(sizes))]
        return [range(place, place + 1) for place in places]
    room = [1] * len(sizes)
    for _ in range(min(world_size, sum(sizes)) - len(sizes)):
        room[max(range(len(sizes)), key=lambda i: (sizes[i] / room[i], -i))] += 1
    return [range(stop - own, stop) for own, stop in zip(room, accumulate(room), strict=True)]


def fold_degrees(
    degrees: Mapping[str, int],
    num_ranks: int,
    *,
    limits: Mapping[str, int],
    shards_all: bool = False,
) -> dict[str, int]:
    """Shrink degrees to those of `num_ranks` ranks; degrees of so many ranks stay as they are.

    tp takes its ranks first, then pp and cp. The rest is dp: all of it shards weights if they were
    sharded over all of dp, none of it if they were not sharded. ep keeps the axes it lies within.

    Args:
        limits: axis -> number of which its degree must be a divisor.
        shards_all: whether dp is for sharding even where the other axes have left it one rank.
    """
    folded = {}
    rest = num_ranks
    for axis in ("tp", "pp", "cp"):
        folded[axis] = math.gcd(degrees[axis], rest, limits.get(axis, 0))
        rest //= folded[axis]
    folded["dp_shard"] = _fold_shard(degrees, rest, shards_all)
    folded["dp_replicate"] = rest // folded["dp_shard"]
    ep = math.gcd(degrees["ep"], limits.get("ep", 0))
    folded["ep"] = math.gcd(ep, folded["tp"] * _exchange_room(degrees, folded))
    return {axis: folded[axis] for axis in degrees}


def _fold_shard(degrees: Mapping[str, int], num_ranks: int, shards_all: bool) -> int:
    """Fold dp_shard into the ranks that are left for dp."""
    if degrees["dp_replicate"] == 1 and (degrees["dp_shard"] > 1 or shards_all):
        return num_ranks
    most = min(degrees["dp_shard"], num_ranks)
    return next(n for n in range(most, 0, -1) if num_ranks % n == 0)


def _exchange_room(degrees: Mapping[str, int], folded: Mapping[str, int]) -> int:
    """The number of ranks with the same tp coordinate that may hold different experts: of dp and cp
    only as far as the original experts were spread over these.
    """
    exchange = degrees["ep"] // math.gcd(degrees["tp"], degrees["ep"])
    if exchange == 1:
        return 1
    room = folded["dp_shard"] * folded["cp"]
    spread_by_shards = degrees["dp_shard"] * degrees["cp"] % exchange == 0
    return room if spread_by_shards else room * folded["dp_replicate"]
