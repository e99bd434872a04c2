"""The only sharding table: each local parameter as slices of the Hugging Face name space.

A decoder's local parameters are fused and tensor-parallel. Loading, saving, weight sync and
checkpoints all describe them as `Slice`s of the global tensors, named as in Hugging Face files. A
tied model has no `lm_head.weight` in this name space. All functions here are pure.

Experts are stacked: one local tensor has all gate and up projections of a layer's experts on this
rank, expert by expert, another all down projections. A rank holds one of `ep` parts of the experts.
The `tp` ranks share in this division: `gcd(tp, ep)` of them hold different experts, and the
`tp / gcd(tp, ep)` that hold the same ones divide each expert's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from spmdrl.models.blocks.dense_mlp import mlp_tensors
from spmdrl.models.blocks.mixers import mixer_tensors
from spmdrl.models.blocks.moe_tensors import moe_tensors
from spmdrl.models.config import ModelConfig
from spmdrl.models.family import Family
from spmdrl.models.specs import MoeMlp
from spmdrl.models.tensors import GlobalTensor, Slice, TensorTable, TpSplit, heads_per_rank

Head = Literal["lm", "score"]
"""Kinds of heads: logits, or one scalar (reward and value models)."""

SCORE, SCORE_BIAS = "score.weight", "score.bias"
"""The scalar head's names, as in `transformers`' ...ForTokenClassification with one label."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A rank's place, which determines the part of a model that it holds.

    Args:
        tp_rank, tp_size: place along the tensor-parallel axis.
        ep_rank, ep_size: index and number of the parts of the experts.
        vocab_multiple: number to whose multiple the vocabulary's rows are padded before the cut.
        blocks: see `all_slices`.
    """

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    vocab_multiple: int = 1
    blocks: int = 1

    def vocabulary_rows(self, vocab_size: int) -> int:
        """Count the rows on each tensor-parallel rank, including the padding of the last ones."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple // self.tp_size

    @property
    def etp_size(self) -> int:
        """Number of ranks over which one expert's width is divided."""
        return self.tp_size // math.gcd(self.tp_size, self.ep_size)

    @property
    def etp_rank(self) -> int:
        return self.tp_rank % self.etp_size


def fused_tensors(model: ModelConfig, head: Head = "lm") -> dict[str, tuple[GlobalTensor, ...]]:
    """Map local names, in order of the forward pass, to their fused tensors, top to bottom."""
    return dict(_all_tensors(model, head))


@lru_cache(maxsize=16)  # plans ask for the same few models hundreds of times
def _all_tensors(model: ModelConfig, head: Head) -> TensorTable:
    embedding = (model.vocab_size, model.hidden_size)
    name = "embed_tokens.weight"
    table = {name: _one(f"model.{name}", embedding, TpSplit.VOCABULARY)}
    for i in range(model.num_layers):
        table |= _layer_tensors(model, i)
    table["norm.weight"] = _one("model.norm.weight", (model.hidden_size,), TpSplit.NONE)
    if head == "score":
        table["head.weight"] = _one(SCORE, (1, model.hidden_size), TpSplit.NONE)
        if model.score_bias:
            table["head.bias"] = _one(SCORE_BIAS, (1,), TpSplit.NONE)
    elif not model.tie_embeddings:
        table["head.weight"] = _one("lm_head.weight", embedding, TpSplit.VOCABULARY)
    return table


def global_shapes(model: ModelConfig, head: Head = "lm") -> dict[str, tuple[int, ...]]:
    """Return the name space: Hugging Face name -> global shape."""
    table = fused_tensors(model, head)
    return {tensor.name: tensor.shape for tensors in table.values() for tensor in tensors}


@lru_cache(maxsize=16)
def num_values(model: ModelConfig, head: Head = "lm") -> int:
    """Count the values of all tensors of the name space."""
    return sum(map(math.prod, global_shapes(model, head).values()))


@lru_cache(maxsize=16)
def buffer_names(model: ModelConfig) -> frozenset[str]:
    """Return the names of the tensors that do not train and are float32 in every layout."""
    table = fused_tensors(model).values()
    return frozenset(tensor.name for held in table for tensor in held if tensor.is_buffer)


def local_parameters(
    model: ModelConfig,
    tp_size: int,
    head: Head = "lm",
    *,
    ep_size: int = 1,
    vocab_multiple: int = 1,
    table: TensorTable | None = None,
) -> dict[str, tuple[int, ...]]:
    """Map local names to local shapes, which are equal on all tensor- and expert-parallel ranks.

    Args:
        vocab_multiple: number to whose multiple the vocabulary's rows are padded.
        table: the local parameters; None: those of the model.
    """
    place = _Place(tp_size=tp_size, ep_size=ep_size, vocab_multiple=vocab_multiple)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensors in (fused_tensors(model, head) if table is None else table).items():
        held = _slices(tensors, place)
        rows = sum(s.rows for s in held)
        if tensors[0].split is TpSplit.VOCABULARY:
            rows = place.vocabulary_rows(tensors[0].shape[0])
        shapes[name] = (rows, held[0].size[-1]) if len(held[0].size) > 1 else (rows,)
    return shapes


def slices(
    model: ModelConfig,
    local_name: str,
    tp_rank: int,
    tp_size: int,
    *,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> tuple[Slice, ...]:
    """Return the slices that the local parameter `local_name` of one rank holds.

    Raises:
        ValueError: the model has no such local parameter.
    """
    table = fused_tensors(model)
    if local_name not in table:
        raise ValueError(f"{model.architecture} has no local parameter {local_name!r}")
    place = _Place(tp_rank=tp_rank, tp_size=tp_size, ep_rank=ep_rank, ep_size=ep_size)
    return _slices(table[local_name], place)


def all_slices(
    model: ModelConfig,
    tp_rank: int,
    tp_size: int,
    head: Head = "lm",
    *,
    ep_rank: int = 0,
    ep_size: int = 1,
    vocab_multiple: int = 1,
    blocks: int = 1,
    table: TensorTable | None = None,
) -> dict[str, tuple[Slice, ...]]:
    """Return `slices` of every local parameter, in order of the forward pass.

    Args:
        vocab_multiple: see `local_parameters`; a rank that has only padding holds no slice.
        blocks: number of blocks, below one another, that make up a fused projection (q, k, v; gate,
            up). Each is the part that one of as many tensor-parallel ranks would hold, so that an
            FSDP shard of the rows is such a part.
        table: see `local_parameters`.
    """
    place = _Place(
        tp_rank=tp_rank,
        tp_size=tp_size,
        ep_rank=ep_rank,
        ep_size=ep_size,
        vocab_multiple=vocab_multiple,
        blocks=blocks,
    )
    table = fused_tensors(model, head) if table is None else table
    return {name: _slices(tensors, place) for name, tensors in table.items()}


def _layer_tensors(model: ModelConfig, layer: int) -> TensorTable:
    """Map local names of a layer to its tensors, as the family's files name them."""
    spec, hidden = model.layers[layer], model.hidden_size
    before, after = spec.norms in ("before", "around"), spec.norms in ("after", "around")

    def norm(name: str, exists: bool) -> dict[str, tuple[GlobalTensor, ...]]:
        own = f"{name}.weight"
        return {own: (GlobalTensor(name=own, shape=(hidden,)),)} if exists else {}

    table = norm("input_norm", before)
    table |= mixer_tensors(spec.mixer, hidden)
    table |= norm("attention_out_norm", after) | norm("post_norm", before)
    if isinstance(spec.mlp, MoeMlp):
        table |= moe_tensors(spec.mlp, hidden)
    else:
        table |= mlp_tensors(spec.mlp, hidden)
    table |= norm("mlp_out_norm", after)
    names = _Names(model.family, f"model.layers.{layer}")
    return {f"layers.{layer}.{local}": names.tensors(held) for local, held in table.items()}


class _Names:
    """Names of a layer's tensors in files, and their places in those that hold several."""

    def __init__(self, family: Family, prefix: str) -> None:
        self._family, self._prefix = family, prefix
        self._holders = {part: holder for holder, parts in family.fused.items() for part in parts}

    def tensors(self, held: tuple[GlobalTensor, ...]) -> tuple[GlobalTensor, ...]:
        rows = {tensor.name: tensor.shape[0] for tensor in held}
        return tuple(self._named(tensor, rows) for tensor in held)

    def _named(self, tensor: GlobalTensor, rows: Mapping[str, int]) -> GlobalTensor:
        module, dot, kind = tensor.name.rpartition(".")
        if kind not in ("weight", "bias"):
            module, dot, kind = tensor.name, "", ""
        holder = self._holders.get(module)
        if holder is not None:
            parts = [f"{part}{dot}{kind}" for part in self._family.fused[holder]]
            first = sum(rows[part] for part in parts[: parts.index(tensor.name)])
            return replace(
                tensor,
                name=f"{self._prefix}.{holder}{dot}{kind}",
                shape=(sum(rows[part] for part in parts), *tensor.shape[1:]),
                region=(first, first + rows[tensor.name]),
            )
        name = self._family.module(module)
        if tensor.expert is not None and not tensor.is_stacked:
            name = name.format(tensor.expert)
        return replace(tensor, name=f"{self._prefix}.{name}{dot}{kind}")


def _one(name: str, shape: tuple[int, ...], split: TpSplit) -> tuple[GlobalTensor, ...]:
    return (GlobalTensor(name=name, shape=shape, split=split),)


def _slices(tensors: tuple[GlobalTensor, ...], place: _Place) -> tuple[Slice, ...]:
    result, offset = [], 0
    experts = range(*_range(tensors[0].num_experts, place.ep_rank, place.ep_size))
    is_fused = len(tensors) > 1
    in_blocks = is_fused and tensors[0].split is TpSplit.ROWS and not tensors[0].is_of_experts
    blocks = place.blocks if in_blocks else 1
    for block in range(blocks):
        rank, size = place.tp_rank * blocks + block, place.tp_size * blocks
        for tensor in tensors:
            if tensor.expert is not None and tensor.expert not in experts:
                continue
            box = _box(tensor, place, rank, size)
            if box is None:
                continue
            start, stop = box
            piece = Slice(
                name=tensor.name, shape=tensor.shape, start=start, stop=stop, offset=offset
            )
            result.append(piece)
            offset += piece.rows
    return tuple(result)


def _box(
    tensor: GlobalTensor, place: _Place, rank: int, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return start and stop of rank `rank`'s box of a tensor, of `size` ranks; None if empty."""
    start, stop = [0] * len(tensor.shape), list(tensor.shape)
    if tensor.is_of_experts:
        rank, size = place.etp_rank, place.etp_size
    if tensor.is_stacked and tensor.expert is not None:
        start[0], stop[0] = tensor.expert, tensor.expert + 1
    rows, columns = tensor.row_dim, len(tensor.shape) - 1
    if tensor.region is not None:
        start[rows], stop[rows] = tensor.region
    first, count = start[rows], stop[rows] - start[rows]
    if tensor.split is TpSplit.COLUMNS:
        start[columns], stop[columns] = _range(tensor.shape[columns], rank, size)
    elif tensor.split is TpSplit.ROWS:
        start[rows], stop[rows] = (first + n for n in _range(count, rank, size))
    elif tensor.split is TpSplit.KV_ROWS:
        start[rows], stop[rows] = (first + n for n in _kv_range(tensor, count, rank, size))
    elif tensor.split is TpSplit.VOCABULARY:
        per_rank = place.vocabulary_rows(tensor.shape[0])
        start[0], stop[0] = (min(n * per_rank, tensor.shape[0]) for n in (rank, rank + 1))
        if start[0] == stop[0]:
            return None
    return tuple(start), tuple(stop)


def _range(size: int, rank: int, ranks: int) -> tuple[int, int]:
    return size * rank // ranks, size * (rank + 1) // ranks


def _kv_range(tensor: GlobalTensor, rows: int, rank: int, ranks: int) -> tuple[int, int]:
    first = tensor.heads * rank // ranks
    per_head = rows // tensor.heads
    return first * per_head, (first + heads_per_rank(tensor.heads, ranks)) * per_head
