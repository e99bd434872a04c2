"""The one table of who holds what: each local parameter as slices of the Hugging Face name space.

A decoder's local parameters are fused and tensor-parallel. Loading, saving, weight sync and
checkpoints all talk of them as `Slice`s of the global tensors named as in Hugging Face files. A
tied model has no `lm_head.weight` in this name space. All functions here are pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from .config import ModelConfig

Head = Literal["lm", "score"]
"""What is read of the hidden states: logits, or one scalar (reward and value models)."""

SCORE = "score.weight"
"""The scalar head's name, as in `transformers`' ...ForSequenceClassification with one label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A box `[start, stop)` of the global tensor `name`, at rows `offset` on of a local tensor."""

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


class Split(Enum):
    """How tensor parallelism divides a global tensor."""

    NONE = "none"
    ROWS = "rows"
    COLUMNS = "columns"
    KV_ROWS = "kv_rows"
    """Rows by key/value head; with fewer heads than ranks, neighbouring ranks hold the same one."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One global tensor within a local parameter."""

    name: str
    shape: tuple[int, ...]
    split: Split


def parameter_parts(config: ModelConfig, head: Head = "lm") -> dict[str, tuple[Part, ...]]:
    """Local name -> the global tensors fused in it, top to bottom; in order of the forward pass."""
    embedding = (config.vocab_size, config.hidden_size)
    table = {"embed_tokens.weight": _one("model.embed_tokens.weight", embedding, Split.ROWS)}
    for i in range(config.num_layers):
        table |= _layer_parts(config, f"layers.{i}", f"model.layers.{i}")
    table["norm.weight"] = _one("model.norm.weight", (config.hidden_size,), Split.NONE)
    if head == "score":
        table["head.weight"] = _one(SCORE, (1, config.hidden_size), Split.NONE)
    elif not config.tie_embeddings:
        table["head.weight"] = _one("lm_head.weight", embedding, Split.ROWS)
    return table


def global_shapes(config: ModelConfig, head: Head = "lm") -> dict[str, tuple[int, ...]]:
    """The name space: Hugging Face name -> global shape."""
    table = parameter_parts(config, head)
    return {part.name: part.shape for parts in table.values() for part in parts}


def local_parameters(
    config: ModelConfig, tp_size: int, head: Head = "lm"
) -> dict[str, tuple[int, ...]]:
    """Local name -> local shape, the same on every tensor-parallel rank."""
    shapes = {}
    for name, parts in parameter_parts(config, head).items():
        held = _slices(config, parts, 0, tp_size)
        shapes[name] = (sum(s.rows for s in held), *held[0].size[1:])
    return shapes


def slices(config: ModelConfig, local_name: str, tp_rank: int, tp_size: int) -> tuple[Slice, ...]:
    """What the local parameter `local_name` of one rank holds.

    Raises:
        ValueError: the model has no such local parameter.
    """
    table = parameter_parts(config)
    if local_name not in table:
        raise ValueError(f"{config.architecture} has no local parameter {local_name!r}")
    return _slices(config, table[local_name], tp_rank, tp_size)


def all_slices(
    config: ModelConfig, tp_rank: int, tp_size: int, head: Head = "lm"
) -> dict[str, tuple[Slice, ...]]:
    """`slices` of every local parameter, in order of the forward pass."""
    table = parameter_parts(config, head)
    return {name: _slices(config, parts, tp_rank, tp_size) for name, parts in table.items()}


def restrict(held: Iterable[Slice], first_row: int, last_row: int) -> tuple[Slice, ...]:
    """What of `held` lies in rows `[first_row, last_row)` of the local tensor (an FSDP shard).

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


def check_tp(config: ModelConfig, tp: int, *, replicate_kv: bool = False) -> None:
    """Refuse a tensor-parallel degree that does not divide the model.

    Args:
        replicate_kv: allow more ranks than key/value heads, each head then on several ranks. Only
            for inference: the gradients of such copies would have to be summed.

    Raises:
        ValueError: naming the numbers that `tp` does not divide.
    """
    sizes = {
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    copies = replicate_kv and tp > config.num_kv_heads
    if not copies:
        sizes["num_key_value_heads"] = config.num_kv_heads
    bad = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    if copies and tp % config.num_kv_heads:
        bad.append(f"num_key_value_heads={config.num_kv_heads} (which does not divide it)")
    if bad:
        raise ValueError(f"tp={tp} does not divide the model's {', '.join(bad)}")


def local_kv_heads(config: ModelConfig, tp_size: int) -> int:
    """Key/value heads on each tensor-parallel rank, at least one."""
    return max(1, config.num_kv_heads // tp_size)


def _layer_parts(config: ModelConfig, local: str, hf: str) -> dict[str, tuple[Part, ...]]:
    hidden, ffn, d = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * d, config.num_kv_heads * d

    def qkv(kind: str, *columns: int) -> tuple[Part, ...]:
        return (
            _part(f"{hf}.self_attn.q_proj.{kind}", (q_rows, *columns), Split.ROWS),
            _part(f"{hf}.self_attn.k_proj.{kind}", (kv_rows, *columns), Split.KV_ROWS),
            _part(f"{hf}.self_attn.v_proj.{kind}", (kv_rows, *columns), Split.KV_ROWS),
        )

    def norm(name: str, size: int) -> tuple[Part, ...]:
        return _one(f"{hf}.{name}.weight", (size,), Split.NONE)

    table = {f"{local}.input_norm.weight": norm("input_layernorm", hidden)}
    table[f"{local}.attention.qkv.weight"] = qkv("weight", hidden)
    if config.qkv_bias:
        table[f"{local}.attention.qkv.bias"] = qkv("bias")
    if config.qk_norm:
        table[f"{local}.attention.q_norm.weight"] = norm("self_attn.q_norm", d)
        table[f"{local}.attention.k_norm.weight"] = norm("self_attn.k_norm", d)
    table[f"{local}.attention.out.weight"] = _one(
        f"{hf}.self_attn.o_proj.weight", (hidden, q_rows), Split.COLUMNS
    )
    table[f"{local}.post_norm.weight"] = norm("post_attention_layernorm", hidden)
    table[f"{local}.mlp.gate_up.weight"] = (
        _part(f"{hf}.mlp.gate_proj.weight", (ffn, hidden), Split.ROWS),
        _part(f"{hf}.mlp.up_proj.weight", (ffn, hidden), Split.ROWS),
    )
    table[f"{local}.mlp.down.weight"] = _one(
        f"{hf}.mlp.down_proj.weight", (hidden, ffn), Split.COLUMNS
    )
    return table


def _part(name: str, shape: tuple[int, ...], split: Split) -> Part:
    return Part(name=name, shape=shape, split=split)


def _one(name: str, shape: tuple[int, ...], split: Split) -> tuple[Part, ...]:
    return (_part(name, shape, split),)


def _slices(
    config: ModelConfig, parts: tuple[Part, ...], tp_rank: int, tp_size: int
) -> tuple[Slice, ...]:
    result, offset = [], 0
    for part in parts:
        start, stop = [0] * len(part.shape), list(part.shape)
        if part.split is Split.COLUMNS:
            start[1], stop[1] = _range(part.shape[1], tp_rank, tp_size)
        elif part.split is Split.ROWS:
            start[0], stop[0] = _range(part.shape[0], tp_rank, tp_size)
        elif part.split is Split.KV_ROWS:
            start[0], stop[0] = _kv_range(config, tp_rank, tp_size)
        result.append(
            Slice(
                name=part.name,
                shape=part.shape,
                start=tuple(start),
                stop=tuple(stop),
                offset=offset,
            )
        )
        offset += stop[0] - start[0]
    return tuple(result)


def _range(size: int, rank: int, ranks: int) -> tuple[int, int]:
    return size * rank // ranks, size * (rank + 1) // ranks


def _kv_range(config: ModelConfig, rank: int, ranks: int) -> tuple[int, int]:
    first = config.num_kv_heads * rank // ranks
    count = local_kv_heads(config, ranks)
    return first * config.head_dim, (first + count) * config.head_dim
