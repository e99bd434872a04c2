"""A small model whose sizes nothing divides evenly, its values, and who holds which of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.local_shards import LocalShard
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice

Shapes = Mapping[str, tuple[int, ...]]
"""A name space: global name -> shape."""

UNTOUCHED = -1.0
"""What targets hold at first; no global tensor has it."""

Degrees = Mapping[str, int]
Case = tuple[list[int], Degrees]
"""Ranks and degrees of a role."""

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 28,
    "hidden_size": 10,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


def model(**changes: Any) -> ModelConfig:
    return parse_config({**MODEL, "tie_word_embeddings": False, **changes})


def values(model: ModelConfig, salt: int = 0) -> dict[str, Tensor]:
    """Every global tensor, all numbers distinct."""
    return numbered(global_shapes(model), salt)


def numbered(shapes: Shapes, salt: int = 0) -> dict[str, Tensor]:
    """Tensors of these shapes, all numbers distinct."""
    result, start = {}, salt * 100_000 + 1
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        result[name] = torch.arange(start, start + count, dtype=torch.float32).reshape(shape)
        start += count
    return result


def tensors_of(
    table: Mapping[str, LocalShard], whole: Mapping[str, Tensor], padding: float | None = None
) -> dict[str, Tensor]:
    """The local tensors of one rank of a layout; `padding` where no slice lies (None: nowhere)."""
    result = {}
    for name, held in table.items():
        tensor = torch.full(held.shape, math.nan if padding is None else padding, dtype=held.dtype)
        for s in held.slices:
            rows = tensor[s.offset : s.offset + s.rows]
            rows.copy_(whole[s.name][box_of(s)].reshape(rows.shape))
        assert padding is not None or not tensor.isnan().any()
        result[name] = tensor
    return result


def box_of(piece: Slice) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
