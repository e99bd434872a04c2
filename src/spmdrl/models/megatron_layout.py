"""Layouts of roles on Megatron ranks, as slices of the Hugging Face name space.

The optimizer's state is a flat range of a buffer of all parameters that train, whatever their
shapes. All functions here are pure, and depend on Megatron only by the way it cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache

import torch

from spmdrl.distributed.mesh import expert_degrees, expert_place, places_of
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.flat_pieces import flat_pieces
from spmdrl.models.local_shards import LocalShard, Table
from spmdrl.models.megatron_chunks import Cut, Parameter, adapter_chunks, rank_chunks
from spmdrl.models.sharding import Head

# The distributed optimizer's state


def buffer_places(
    chunk: Sequence[Parameter], num_shards: int
) -> tuple[dict[str, tuple[int, int]], list[tuple[int, int]]]:
    """Compute the places of a chunk's parameters in its flat buffer, and the buffer's buckets.

    The layout is that of megatron-core's `_ParamAndGradBuffer`: last parameter first, each at a
    multiple of 64 values, in buckets of a multiple of 128 that the shards divide. An embedding that
    two stages hold is a separate bucket, so that both cut it alike.
    """
    unit = math.lcm(num_shards, 128)
    places: dict[str, tuple[int, int]] = {}
    buckets: list[tuple[int, int]] = []
    at = first = 0

    def close(stop: int) -> int:
        buckets.append((first, -(-stop // unit) * unit))
        return buckets[-1][1]

    for parameter in reversed(chunk):
        at = -(-at // 64) * 64
        if parameter.shared and at > first:
            at = first = close(at)
        places[parameter.name] = at, at + math.prod(parameter.shape)
        at = places[parameter.name][1]
        if parameter.shared:
            at = first = close(at)
    if at > first:
        close(at)
    return places, buckets


def shard_range(
    place: tuple[int, int], buckets: Sequence[tuple[int, int]], shard: int, num_shards: int
) -> tuple[int, int]:
    """Return the range of a flattened parameter that shard `shard` holds; (0, 0) for none."""
    start, stop = place
    first, last = next(bucket for bucket in buckets if bucket[0] <= start < bucket[1])
    size = (last - first) // num_shards
    low = max(start, first + shard * size)
    high = min(stop, first + (shard + 1) * size)
    return (low - start, high - start) if low < high else (0, 0)


def chunk_ranges(
    chunk: Sequence[Parameter], shard: int, num_shards: int, exchange: int = 1
) -> dict[str, tuple[int, int]]:
    """Return `shard_range` of every parameter. Experts have their own buffer; every `exchange`-th
    shard holds the same ones.
    """
    found: dict[str, tuple[int, int]] = {}
    for of_experts in (False, True):
        own = [parameter for parameter in chunk if parameter.is_expert is of_experts]
        part = exchange if of_experts else 1
        if not own:
            continue
        index, count = shard // part, num_shards // part
        places, buckets = buffer_places(own, count)
        found |= {p.name: shard_range(places[p.name], buckets, index, count) for p in own}
    return found


# The layouts of roles


def megatron_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    dtype: torch.dtype,
    head: Head = "lm",
    *,
    frozen: Collection[str] = (),
    adapter: Adapter | None = None,
    only: Collection[int] | None = None,
) -> dict[int, Table]:
    """Every rank's weights: the tensor-parallel part of its pipeline stage.

    Args:
        frozen: Hugging Face names of tensors that do not train.
        adapter: an adapter whose tensors the ranks hold as well.
        only: the ranks whose tables are made; None: all of them.
    """

    def table(place: Mapping[str, int], shard: int) -> Table:
        chunks = _base_chunks(model, degrees, cut, place, head)
        if adapter is not None:
            added = adapter_chunks(model, cut, place["tp"], place["pp"], adapter)
            chunks = [*chunks, *added]
        return {
            p.name: LocalShard(
                shape=p.shape,
                dtype=dtype,
                slices=p.slices,
                frozen=any(part.name in frozen for part in p.slices),
            )
            for chunk in chunks
            for p in chunk
        }

    return _rank_tables(ranks, degrees, 1, table, only)


def megatron_state_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    head: Head = "lm",
    *,
    adapter: Adapter | None = None,
    only: Collection[int] | None = None,
) -> dict[int, Table]:
    """Every rank's part of the masters, and so of each moment: flat ranges, as boxes.

    Args:
        adapter: an adapter that trains, and a scalar head with it, in place of the matrices.
        only: the ranks whose tables are made; None: all of them.
    """
    num_shards = degrees["dp_shard"] * degrees["cp"]
    exchange = expert_degrees(degrees)["exchange"]

    def table(place: Mapping[str, int], shard: int) -> Table:
        if adapter is None:
            chunks = _base_chunks(model, degrees, cut, place, head)
        else:
            chunks = adapter_chunks(model, cut, place["tp"], place["pp"], adapter, head)
        found = {}
        for chunk in chunks:
            ranges = chunk_ranges(chunk, shard, num_shards, exchange)
            for p in chunk:
                for piece in flat_pieces(p, *ranges[p.name]):
                    found[f"{p.name}:{piece.start}"] = LocalShard(
                        shape=piece.shape, dtype=torch.float32, slices=piece.slices
                    )
        return found

    return _rank_tables(ranks, degrees, num_shards, table, only)


def _base_chunks(
    model: ModelConfig,
    degrees: Mapping[str, int],
    cut: Cut,
    place: Mapping[str, int],
    head: Head,
) -> list[tuple[Parameter, ...]]:
    ep_rank = expert_place(degrees, place)["ep"]
    return _chunks(model, cut, place["tp"], place["pp"], head, ep_rank=ep_rank)


# a role's weights and its state are cut from the same chunks, and ranks that differ in shards alone
# have the same
_chunks = lru_cache(maxsize=64)(rank_chunks)


def _rank_tables(
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    num_shards: int,
    table: Callable[[Mapping[str, int], int], Table],
    only: Collection[int] | None,
) -> dict[int, Table]:
    """Ranks with the same pp, tp, ep and shard coordinates share one table."""
    tables: dict[tuple[int, int, int, int], Table] = {}
    layout = {}
    for rank, place in places_of(ranks, degrees, only):
        shard = (place["dp_shard"] * degrees["cp"] + place["cp"]) % num_shards
        at = (place["pp"], place["tp"], expert_place(degrees, place)["ep"], shard)
        if at not in tables:
            tables[at] = table(place, shard)
        layout[rank] = tables[at]
    return layout
