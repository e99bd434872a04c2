"""FSDP2's cuts of a decoder's local parameters into shards, in terms of the sharding table.

Shards can match the tensors of a rollout's tensor-parallel ranks. Fused projections are then in
blocks (see `sharding.all_slices`), and FSDP cuts by columns where tensor parallelism does. A rank
that trains a shard then already holds the weights that it generates with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Head, fused_tensors
from spmdrl.models.specs import SoftmaxAttention
from spmdrl.models.tensors import Slice, TpSplit, is_expert_parameter, restrict


def fitting_blocks(model: ModelConfig, degrees: Mapping[str, int], engine_tp: int) -> int:
    """Return the number of blocks with which the shards of a role equal the tensors of an engine on
    the same ranks; 1 if that is impossible.
    """
    shards = degrees.get("dp_shard", 1) * degrees.get("cp", 1)
    plain = degrees.get("tp", 1) == degrees.get("pp", 1) == 1 and degrees.get("dp_shard", 1) > 1
    # the engine's innermost axis is tp, as it is the shards' here
    sizes = [model.vocab_size]
    for spec in model.layers:
        plain = plain and isinstance(spec.mixer, SoftmaxAttention)
        if isinstance(spec.mixer, SoftmaxAttention):
            sizes += (spec.mixer.num_heads, spec.mixer.num_kv_heads)
    if model.dense_width is not None:
        sizes.append(model.dense_width)
    if model.moe is not None and model.moe.shared is not None:
        sizes.append(model.moe.shared.width)
    return shards if plain and engine_tp == shards and not any(n % shards for n in sizes) else 1


def fsdp_dims(model: ModelConfig, head: Head = "lm", blocks: int = 1) -> dict[str, int | None]:
    """Map local names to the dim along which FSDP cuts the parameter; None if it is not cut.

    FSDP does not divide parameters that tensor parallelism does not divide (norms, a scalar head,
    routers). With `blocks` (see `all_slices`) it cuts like tensor parallelism of that degree.
    Experts are cut by rows.
    """
    dims: dict[str, int | None] = {}
    for name, tensors in fused_tensors(model, head).items():
        if is_expert_parameter(name):
            dims[name] = 0
        elif tensors[0].split is TpSplit.NONE:
            dims[name] = None
        elif tensors[0].split is TpSplit.COLUMNS and blocks > 1:
            dims[name] = 1
        else:
            dims[name] = 0
    return dims


def fsdp_shard(
    shape: tuple[int, ...], held: Iterable[Slice], dim: int | None, index: int, count: int
) -> tuple[tuple[int, ...], tuple[Slice, ...]]:
    """Return shape and slices of shard `index` of `count` of a local parameter, as FSDP2 cuts it.

    Dim 0 is cut as by `torch.chunk`: the first ranks have ceil(rows / count) rows each. Columns
    must divide evenly.
    """
    held = tuple(held)
    if dim is None or count == 1:
        return shape, held
    size = -(-shape[dim] // count)
    first, last = (min(i * size, shape[dim]) for i in (index, index + 1))
    if dim == 0:
        return (last - first, *shape[1:]), restrict(held, first, last)
    (piece,) = held
    start, stop = (piece.start[-1] + first, piece.start[-1] + last)
    part = replace(piece, start=(*piece.start[:-1], start), stop=(*piece.stop[:-1], stop))
    return (shape[0], last - first), (part,)
