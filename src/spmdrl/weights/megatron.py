"""Layouts of roles that Megatron trains, of their weights and of their optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from spmdrl.distributed.expert_axes import expert_degrees, expert_place
from spmdrl.distributed.mesh import coordinates
from spmdrl.models.config import ModelConfig
from spmdrl.models.megatron_layout import (
    Cut,
    Parameter,
    chunk_ranges,
    flat_pieces,
    rank_chunks,
)
from spmdrl.models.sharding import Head
from spmdrl.weights.layout import Held, Table


def megatron_layout(
    config: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    dtype: torch.dtype,
    head: Head = "lm",
) -> dict[int, Table]:
    """Every rank's weights: the tensor-parallel part of its pipeline stage."""

    def table(chunk: tuple[Parameter, ...], shard: int) -> Table:
        return {p.name: Held(shape=p.shape, dtype=dtype, slices=p.slices) for p in chunk}

    return _layout(config, ranks, degrees, cut, head, 1, table)


def megatron_state_layout(
    config: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    head: Head = "lm",
) -> dict[int, Table]:
    """Every rank's part of the masters, and so of each moment: flat ranges, as boxes."""
    num_shards = degrees["dp_shard"] * degrees["cp"]
    exchange = expert_degrees(degrees)["exchange"]

    def table(chunk: tuple[Parameter, ...], shard: int) -> Table:
        ranges = chunk_ranges(chunk, shard, num_shards, exchange)
        return {
            f"{p.name}:{piece.start}": Held(
                shape=piece.shape, dtype=torch.float32, slices=piece.slices
            )
            for p in chunk
            for piece in flat_pieces(p, *ranges[p.name])
        }

    return _layout(config, ranks, degrees, cut, head, num_shards, table)


def _layout(
    config: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    head: Head,
    num_shards: int,
    table: Callable[[tuple[Parameter, ...], int], Table],
) -> dict[int, Table]:
    """Ranks with the same pp, tp, ep and shard coordinates share one table."""
    tables: dict[tuple[int, int, int, int], Table] = {}
    layout = {}
    for rank, place in zip(ranks, coordinates(degrees), strict=True):
        shard = (place["dp_shard"] * degrees["cp"] + place["cp"]) % num_shards
        ep_rank = expert_place(degrees, place)["ep"]
        at = (place["pp"], place["tp"], ep_rank, shard)
        if at not in tables:
            chunks = rank_chunks(config, cut, place["tp"], place["pp"], head, ep_rank=ep_rank)
            tables[at] = {n: held for chunk in chunks for n, held in table(chunk, shard).items()}
        layout[rank] = tables[at]
    return layout
