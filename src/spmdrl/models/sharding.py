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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from spmdrl.models.config import ModelConfig
from spmdrl.models.experts import EXPERT_NAMES, MoeConfig

Head = Literal["lm", "score"]
"""Kinds of heads: logits, or one scalar (reward and value models)."""

SCORE = "score.weight"
"""The scalar head's name, as in `transformers`' ...ForSequenceClassification with one label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A box `[start, stop)` of the global tensor `name`, from row `offset` of a local tensor."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    offset: int

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def rows(self) -> int:
        return self.stop[0] - self.start[0]

    @property
    def numel(self) -> int:
        count = 1
        for n in self.size:
            count *= n
        return count

    @property
    def is_whole(self) -> bool:
        return self.size == self.shape


class TpSplit(Enum):
    """Ways in which tensor parallelism divides a global tensor."""

    NONE = "none"
    ROWS = "rows"
    COLUMNS = "columns"
    KV_ROWS = "kv_rows"
    """Rows by key/value head; with fewer heads than ranks, neighbouring ranks share one."""
    VOCABULARY = "vocabulary"
    """Rows; an engine may hold additional ones at the end, which are padding."""


@dataclass(frozen=True, kw_only=True)
class GlobalTensor:
    """One global tensor within a local parameter; `expert` is its expert's number, if any."""

    name: str
    shape: tuple[int, ...]
    split: TpSplit
    expert: int | None = None


TensorTable = Mapping[str, tuple[GlobalTensor, ...]]
"""Local name -> the global tensors in it, top to bottom."""


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
    embedding = (model.vocab_size, model.hidden_size)
    table = {
        "embed_tokens.weight": _one("model.embed_tokens.weight", embedding, TpSplit.VOCABULARY)
    }
    for i in range(model.num_layers):
        table |= _layer_tensors(model, i)
    table["norm.weight"] = _one("model.norm.weight", (model.hidden_size,), TpSplit.NONE)
    if head == "score":
        table["head.weight"] = _one(SCORE, (1, model.hidden_size), TpSplit.NONE)
    elif not model.tie_embeddings:
        table["head.weight"] = _one("lm_head.weight", embedding, TpSplit.VOCABULARY)
    return table


def global_shapes(model: ModelConfig, head: Head = "lm") -> dict[str, tuple[int, ...]]:
    """Return the name space: Hugging Face name -> global shape."""
    table = fused_tensors(model, head)
    return {tensor.name: tensor.shape for tensors in table.values() for tensor in tensors}


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
    shapes = {}
    for name, tensors in (fused_tensors(model, head) if table is None else table).items():
        held = _slices(model, tensors, place)
        rows = sum(s.rows for s in held)
        if tensors[0].split is TpSplit.VOCABULARY:
            rows = place.vocabulary_rows(model.vocab_size)
        shapes[name] = (rows, *held[0].size[1:])
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
    return _slices(model, table[local_name], place)


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
    return {name: _slices(model, tensors, place) for name, tensors in table.items()}


def is_expert_parameter(local_name: str) -> bool:
    """Whether a local parameter holds experts, which `ep` divides, and FSDP over other ranks."""
    return ".mlp.experts." in local_name


def restrict(held: Iterable[Slice], first_row: int, last_row: int) -> tuple[Slice, ...]:
    """Restrict `held` to rows `[first_row, last_row)` of the local tensor (an FSDP shard).

    The offsets of the result count from `first_row`, that is, within the shard.
    """
    result = []
    for s in held:
        low, high = max(s.offset, first_row), min(s.offset + s.rows, last_row)
        if low < high:
            start = s.start[0] + low - s.offset
            stop = s.start[0] + high - s.offset
            result.append(
                replace(
                    s,
                    start=(start, *s.start[1:]),
                    stop=(stop, *s.stop[1:]),
                    offset=low - first_row,
                )
            )
    return tuple(result)


def local_kv_heads(model: ModelConfig, tp_size: int) -> int:
    """Count the key/value heads on each tensor-parallel rank, at least one."""
    return max(1, model.num_kv_heads // tp_size)


def _layer_tensors(model: ModelConfig, layer: int) -> dict[str, tuple[GlobalTensor, ...]]:
    local, hf = f"layers.{layer}", f"model.layers.{layer}"
    hidden, d = model.hidden_size, model.head_dim
    q_rows, kv_rows = model.num_heads * d, model.num_kv_heads * d

    def qkv(kind: str, *columns: int) -> tuple[GlobalTensor, ...]:
        return (
            _tensor(f"{hf}.self_attn.q_proj.{kind}", (q_rows, *columns), TpSplit.ROWS),
            _tensor(f"{hf}.self_attn.k_proj.{kind}", (kv_rows, *columns), TpSplit.KV_ROWS),
            _tensor(f"{hf}.self_attn.v_proj.{kind}", (kv_rows, *columns), TpSplit.KV_ROWS),
        )

    def norm(name: str, size: int) -> tuple[GlobalTensor, ...]:
        return _one(f"{hf}.{name}.weight", (size,), TpSplit.NONE)

    table = {f"{local}.input_norm.weight": norm("input_layernorm", hidden)}
    table[f"{local}.attention.qkv.weight"] = qkv("weight", hidden)
    if model.qkv_bias:
        table[f"{local}.attention.qkv.bias"] = qkv("bias")
    if model.qk_norm:
        table[f"{local}.attention.q_norm.weight"] = norm("self_attn.q_norm", d)
        table[f"{local}.attention.k_norm.weight"] = norm("self_attn.k_norm", d)
    table[f"{local}.attention.out.weight"] = _one(
        f"{hf}.self_attn.o_proj.weight", (hidden, q_rows), TpSplit.COLUMNS
    )
    table[f"{local}.post_norm.weight"] = norm("post_attention_layernorm", hidden)
    if model.moe is not None and layer in model.moe.layers:
        return table | _expert_tensors(model, model.moe, local, hf)
    return table | _dense_tensors(model, local, hf)


def _dense_tensors(model: ModelConfig, local: str, hf: str) -> dict[str, tuple[GlobalTensor, ...]]:
    hidden, ffn = model.hidden_size, model.intermediate_size
    return {
        f"{local}.mlp.gate_up.weight": (
            _tensor(f"{hf}.mlp.gate_proj.weight", (ffn, hidden), TpSplit.ROWS),
            _tensor(f"{hf}.mlp.up_proj.weight", (ffn, hidden), TpSplit.ROWS),
        ),
        f"{local}.mlp.down.weight": _one(
            f"{hf}.mlp.down_proj.weight", (hidden, ffn), TpSplit.COLUMNS
        ),
    }


def _expert_tensors(
    model: ModelConfig, moe: MoeConfig, local: str, hf: str
) -> dict[str, tuple[GlobalTensor, ...]]:
    hidden, ffn = model.hidden_size, moe.intermediate_size
    names = EXPERT_NAMES[model.architecture]

    def tensor(name: str, expert: int, shape: tuple[int, ...], split: TpSplit) -> GlobalTensor:
        return GlobalTensor(
            name=f"{hf}.{name.format(expert)}", shape=shape, split=split, expert=expert
        )

    experts = range(moe.num_experts)
    return {
        f"{local}.mlp.router.weight": _one(
            f"{hf}.{names.router}", (moe.num_experts, hidden), TpSplit.NONE
        ),
        f"{local}.mlp.experts.gate_up": tuple(
            tensor(name, expert, (ffn, hidden), TpSplit.ROWS)
            for expert in experts
            for name in (names.gate, names.up)
        ),
        f"{local}.mlp.experts.down": tuple(
            tensor(names.down, expert, (hidden, ffn), TpSplit.COLUMNS) for expert in experts
        ),
    }


def _tensor(name: str, shape: tuple[int, ...], split: TpSplit) -> GlobalTensor:
    return GlobalTensor(name=name, shape=shape, split=split)


def _one(name: str, shape: tuple[int, ...], split: TpSplit) -> tuple[GlobalTensor, ...]:
    return (_tensor(name, shape, split),)


def _slices(
    model: ModelConfig, tensors: tuple[GlobalTensor, ...], place: _Place
) -> tuple[Slice, ...]:
    result, offset = [], 0
    experts = range(0)
    if model.moe is not None:
        experts = range(*_range(model.moe.num_experts, place.ep_rank, place.ep_size))
    is_fused = len(tensors) > 1
    in_blocks = is_fused and tensors[0].split is TpSplit.ROWS and tensors[0].expert is None
    blocks = place.blocks if in_blocks else 1
    for block in range(blocks):
        rank, size = place.tp_rank * blocks + block, place.tp_size * blocks
        for tensor in tensors:
            if tensor.expert is not None and tensor.expert not in experts:
                continue
            box = _box(model, tensor, place, rank, size)
            if box is None:
                continue
            start, stop = box
            result.append(
                Slice(name=tensor.name, shape=tensor.shape, start=start, stop=stop, offset=offset)
            )
            offset += stop[0] - start[0]
    return tuple(result)


def _box(
    model: ModelConfig, tensor: GlobalTensor, place: _Place, rank: int, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return start and stop of rank `rank`'s box of a tensor, of `size` ranks; None if empty."""
    start, stop = [0] * len(tensor.shape), list(tensor.shape)
    if tensor.expert is not None:
        rank, size = place.etp_rank, place.etp_size
    if tensor.split is TpSplit.COLUMNS:
        start[1], stop[1] = _range(tensor.shape[1], rank, size)
    elif tensor.split is TpSplit.ROWS:
        start[0], stop[0] = _range(tensor.shape[0], rank, size)
    elif tensor.split is TpSplit.KV_ROWS:
        start[0], stop[0] = _kv_range(model, rank, size)
    elif tensor.split is TpSplit.VOCABULARY:
        rows = place.vocabulary_rows(tensor.shape[0])
        start[0], stop[0] = (min(n * rows, tensor.shape[0]) for n in (rank, rank + 1))
        if start[0] == stop[0]:
            return None
    return tuple(start), tuple(stop)


def _range(size: int, rank: int, ranks: int) -> tuple[int, int]:
    return size * rank // ranks, size * (rank + 1) // ranks


def _kv_range(model: ModelConfig, rank: int, ranks: int) -> tuple[int, int]:
    first = model.num_kv_heads * rank // ranks
    count = local_kv_heads(model, ranks)
    return first * model.head_dim, (first + count) * model.head_dim
