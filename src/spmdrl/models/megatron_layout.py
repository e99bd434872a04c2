"""Layout of a model on a Megatron rank, as slices of the Hugging Face name space.

Local parameters have the names that `sharding` gives them, so that a rollout on the same rank can
use those that are equal. The differences are:

- QKV is interleaved: for each key/value head the rows of its queries, of the key, of the value.
- The vocabulary is padded to a multiple of tp; no slice covers the padding.
- A pipeline stage holds whole layers, in `vpp` runs of them (interleaved schedule).
- Experts are separate parameters, not stacked.
- The optimizer's state is a flat range of a buffer of all parameters, whatever their shapes.

All functions here are pure, and depend on Megatron only by the way it cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from spmdrl.distributed.mesh import coordinates, expert_degrees, expert_place
from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import LocalShard, Table
from spmdrl.models.sharding import Head, Slice, all_slices, fused_tensors, restrict

EMBEDDING, HEAD = "embed_tokens.weight", "head.weight"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Numbers of parts that a role's model is cut into.

    Args:
        ep: number of parts of the experts, see `distributed.mesh`.
        vpp: number of runs of layers on each pipeline rank.
        fused_norms: whether norms belong to the projection after them (TransformerEngine).
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    fused_norms: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of a model chunk.

    Args:
        name: name as in `sharding`, with the layer's number in the whole model.
        module_name: Megatron's name, with the layer's number in the chunk.
        shared: whether it is the embedding of a tied model, which two pipeline stages hold.
        is_expert: whether it is an expert and other ranks hold others (ep > 1).
    """

    name: str
    module_name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    shared: bool = False
    is_expert: bool = False

    @property
    def is_replicated(self) -> bool:
        """Whether every tp rank holds it, since tensor parallelism does not divide it. It always
        divides experts; a rank with only padding of the vocabulary holds no slice of it.
        """
        return bool(self.slices) and not self.is_expert and all(s.is_whole for s in self.slices)


def padded_vocab(model: ModelConfig, tp: int) -> int:
    """Return the size of the vocabulary with padding, which tp divides."""
    return -(-model.vocab_size // tp) * tp


def chunk_layers(model: ModelConfig, cut: Cut, pp_rank: int, chunk: int) -> range:
    """Return a chunk's layers: stage p has the p-th part of each of `vpp` parts of the model."""
    size = model.num_layers // (cut.pp * cut.vpp)
    first = (chunk * cut.pp + pp_rank) * size
    return range(first, first + size)


def rank_chunks(
    model: ModelConfig,
    cut: Cut,
    tp_rank: int,
    pp_rank: int,
    head: Head = "lm",
    *,
    ep_rank: int = 0,
) -> list[tuple[Parameter, ...]]:
    """List the chunks of one rank, each with its parameters in the order of Megatron's modules."""
    held = all_slices(model, tp_rank, cut.tp, head, ep_rank=ep_rank, ep_size=cut.ep)
    chunks = []
    for chunk in range(cut.vpp):
        is_first = pp_rank == 0 and chunk == 0
        is_last = pp_rank == cut.pp - 1 and chunk == cut.vpp - 1
        rows: list[Parameter] = []
        if is_first:
            rows.append(_vocab(model, cut, tp_rank, EMBEDDING, "embedding.word_embeddings.weight"))
        for number, layer in enumerate(chunk_layers(model, cut, pp_rank, chunk)):
            rows += _layer(model, cut, tp_rank, held, f"layers.{layer}", number)
        if is_last:
            rows.append(_plain(held, "norm.weight", "decoder.final_layernorm.weight"))
            if head == "score":
                rows.append(_plain(held, HEAD, "output_layer.weight"))
            elif not model.tie_embeddings:
                rows.append(_vocab(model, cut, tp_rank, HEAD, "output_layer.weight"))
            elif cut.pp > 1:
                rows.append(_vocab(model, cut, tp_rank, EMBEDDING, "output_layer.weight"))
        tied = model.tie_embeddings and head == "lm" and cut.pp > 1
        chunks.append(tuple(replace(r, shared=tied and r.name == EMBEDDING) for r in rows))
    return chunks


def _plain(held: Mapping[str, tuple[Slice, ...]], name: str, module_name: str) -> Parameter:
    slices = held[name]
    shape = (sum(s.rows for s in slices), *slices[0].size[1:])
    return Parameter(name=name, module_name=module_name, shape=shape, slices=slices)


def _vocab(model: ModelConfig, cut: Cut, tp_rank: int, name: str, module_name: str) -> Parameter:
    """Make a parameter with rows of a padded vocabulary; the last ranks may have only padding."""
    [tensor] = fused_tensors(model)[name]
    rows = padded_vocab(model, cut.tp) // cut.tp
    whole = Slice(name=tensor.name, shape=tensor.shape, start=(0, 0), stop=tensor.shape, offset=0)
    slices = restrict([whole], tp_rank * rows, (tp_rank + 1) * rows)
    shape = (rows, model.hidden_size)
    return Parameter(name=name, module_name=module_name, shape=shape, slices=slices)


def _layer(
    model: ModelConfig,
    cut: Cut,
    tp_rank: int,
    held: Mapping[str, tuple[Slice, ...]],
    local: str,
    number: int,
) -> Iterator[Parameter]:
    prefix = f"decoder.layers.{number}"
    input_norm, post_norm = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    has_experts = f"{local}.mlp.router.weight" in held
    if cut.fused_norms:
        input_norm = "self_attention.linear_qkv.layer_norm_weight"
        if not has_experts:
            post_norm = "mlp.linear_fc1.layer_norm_weight"

    def plain(name: str, module_name: str) -> Parameter:
        return _plain(held, f"{local}.{name}", f"{prefix}.{module_name}")

    if not cut.fused_norms:
        yield plain("input_norm.weight", input_norm)
    yield plain("attention.out.weight", "self_attention.linear_proj.weight")
    if cut.fused_norms:
        yield plain("input_norm.weight", input_norm)
    for kind in ("weight", *["bias"] * model.qkv_bias):
        whole = plain(f"attention.qkv.{kind}", f"self_attention.linear_qkv.{kind}")
        yield replace(whole, slices=_interleave(model, whole.slices))
    if model.qk_norm:
        yield plain("attention.q_norm.weight", "self_attention.q_layernorm.weight")
        yield plain("attention.k_norm.weight", "self_attention.k_layernorm.weight")
    yield plain("post_norm.weight", post_norm)
    if has_experts:
        yield plain("mlp.router.weight", "mlp.router.weight")
        yield from _experts(model, cut, held, local, prefix)
        return
    yield plain("mlp.gate_up.weight", "mlp.linear_fc1.weight")
    yield plain("mlp.down.weight", "mlp.linear_fc2.weight")


def _experts(
    model: ModelConfig,
    cut: Cut,
    held: Mapping[str, tuple[Slice, ...]],
    local: str,
    prefix: str,
) -> Iterator[Parameter]:
    """Yield this rank's experts: modules one after another, or (TransformerEngine) weights of one
    grouped module, first all fc1 and then all fc2.
    """
    assert model.moe is not None
    count = model.moe.num_experts // cut.ep
    kinds = (("gate_up", "linear_fc1"), ("down", "linear_fc2"))

    def one(expert: int, kind: str, module: str) -> Parameter:
        whole = held[f"{local}.mlp.experts.{kind}"]
        rows = sum(piece.rows for piece in whole) // count
        own = restrict(whole, expert * rows, (expert + 1) * rows)
        name = f"local_experts.{expert}.{module}.weight"
        if cut.fused_norms:
            name = f"{module}.weight{expert}"
        return Parameter(
            name=f"{local}.mlp.experts.{expert}.{kind}",
            module_name=f"{prefix}.mlp.experts.{name}",
            shape=(rows, own[0].size[1]),
            slices=own,
            is_expert=cut.ep > 1,
        )

    if cut.fused_norms:
        yield from (one(expert, *kind) for kind in kinds for expert in range(count))
    else:
        yield from (one(expert, *kind) for expert in range(count) for kind in kinds)


def _interleave(model: ModelConfig, slices: Sequence[Slice]) -> tuple[Slice, ...]:
    """Reorder slices of q, k and v, which are below one another, by key/value head."""
    groups = slices[1].rows // model.head_dim
    result, offset = [], 0
    for group in range(groups):
        for part in slices:
            rows = part.rows // groups
            first = part.offset + group * rows
            for piece in restrict([part], first, first + rows):
                result.append(replace(piece, offset=offset))
                offset += piece.rows
    return tuple(result)


# The distributed optimizer's state


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatPiece:
    """A box of a parameter's own shape that a flat range of the parameter contains entirely.

    Args:
        start, stop: range of its values in the flattened parameter.
        shape: shape of the box.
        slices: slices of the name space in the box.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


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


def flat_pieces(parameter: Parameter, start: int, stop: int) -> list[FlatPiece]:
    """Cut values `[start, stop)` of a flattened parameter into boxes: the end of a row, whole rows,
    the beginning of a row.
    """
    width = math.prod(parameter.shape[1:])
    row = -(-start // width)
    cuts = sorted({start, min(row * width, stop), max(stop // width * width, start), stop})
    pieces = []
    for a, b in pairwise(cuts):
        rows, column = (a // width, -(-b // width)), a % width
        columns = (column, column + min(b - a, width))
        shape = (rows[1] - rows[0], *parameter.shape[1:])
        slices = restrict(parameter.slices, *rows)
        if len(parameter.shape) > 1:
            shape = (shape[0], columns[1] - columns[0])
            slices = tuple(_columns(piece, columns) for piece in slices)
        pieces.append(FlatPiece(start=a, stop=b, shape=shape, slices=slices))
    return pieces


def _columns(piece: Slice, columns: tuple[int, int]) -> Slice:
    first = piece.start[1]
    start, stop = (piece.start[0], first + columns[0]), (piece.stop[0], first + columns[1])
    return replace(piece, start=start, stop=stop)


# The layouts of roles


def megatron_layout(
    model: ModelConfig,
    ranks: Sequence[int],
    degrees: Mapping[str, int],
    cut: Cut,
    dtype: torch.dtype,
    head: Head = "lm",
) -> dict[int, Table]:
    """Every rank's weights: the tensor-parallel part of its pipeline stage."""

    def table(chunk: tuple[Parameter, ...], shard: int) -> Table:
        return {p.name: LocalShard(shape=p.shape, dtype=dtype, slices=p.slices) for p in chunk}

    return _rank_tables(model, ranks, degrees, cut, head, 1, table)


def megatron_state_layout(
    model: ModelConfig,
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
            f"{p.name}:{piece.start}": LocalShard(
                shape=piece.shape, dtype=torch.float32, slices=piece.slices
            )
            for p in chunk
            for piece in flat_pieces(p, *ranges[p.name])
        }

    return _rank_tables(model, ranks, degrees, cut, head, num_shards, table)


def _rank_tables(
    model: ModelConfig,
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
            chunks = rank_chunks(model, cut, place["tp"], place["pp"], head, ep_rank=ep_rank)
            tables[at] = {n: held for chunk in chunks for n, held in table(chunk, shard).items()}
        layout[rank] = tables[at]
    return layout
