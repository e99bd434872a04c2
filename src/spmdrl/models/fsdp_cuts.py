"""How FSDP2 cuts a decoder's local parameters into shards, in terms of the sharding table.

Shards can line up with what the tensor-parallel ranks of a rollout hold: fused projections then lie
in blocks (see `sharding.all_slices`), and those that tensor parallelism divides by columns FSDP
divides so too. A rank that trains a shard then has all that it generates with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .config import ModelConfig
from .sharding import Head, Slice, Split, parameter_parts, restrict


def fitting_blocks(config: ModelConfig, degrees: Mapping[str, int], engine_tp: int) -> int:
    """The blocks with which the shards of a role are what an engine's ranks hold, if both are on
    the same ranks; 1: it cannot be.
    """
    shards = degrees.get("dp_shard", 1) * degrees.get("cp", 1)
    plain = degrees.get("tp", 1) == degrees.get("pp", 1) == 1 and degrees.get("dp_shard", 1) > 1
    # tp is the innermost axis there, as the shards are here
    sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size)
    return shards if plain and engine_tp == shards and not any(n % shards for n in sizes) else 1


def fsdp_dims(config: ModelConfig, head: Head = "lm", blocks: int = 1) -> dict[str, int | None]:
    """Local name -> the dim along which FSDP cuts the parameter; None: every rank has all of it.

    What tensor parallelism does not divide (norms, a scalar head, routers) FSDP does not either. In
    `blocks` (see `all_slices`) it cuts as tensor parallelism of that degree does.
    """
    dims: dict[str, int | None] = {}
    for name, parts in parameter_parts(config, head).items():
        if parts[0].split is Split.NONE:
            dims[name] = None
        elif parts[0].split is Split.COLUMNS and blocks > 1 and parts[0].expert is None:
            dims[name] = 1
        else:
            dims[name] = 0
    return dims


def fsdp_shard(
    shape: tuple[int, ...], held: Iterable[Slice], dim: int | None, index: int, count: int
) -> tuple[tuple[int, ...], tuple[Slice, ...]]:
    """Shape and slices of shard `index` of `count` of a local parameter, as FSDP2 cuts it.

    Along dim 0 as `torch.chunk` does: the first ranks have ceil(rows / count) each. Columns must
    divide evenly.
    """
    held = tuple(held)
    if dim is None or count == 1:
        return shape, held
    size = -(-shape[dim] // count)
    first, last = (min(i * size, shape[dim]) for i in (index, index + 1))
    if dim == 0:
        return (last - first, *shape[1:]), restrict(held, first, last)
    (piece,) = held
    start, stop = (piece.start[1] + first, piece.start[1] + last)
    part = replace(piece, start=(piece.start[0], start), stop=(piece.stop[0], stop))
    return (shape[0], last - first), (part,)
