"""A small model whose sizes nothing divides evenly, its values, and who holds which of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.sharding import global_shapes
from spmdrl.weights.layout import Held

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


def values(config: ModelConfig, salt: int = 0) -> dict[str, Tensor]:
    """Every global tensor, all numbers distinct."""
    result, start = {}, salt * 100_000
    for name, shape in global_shapes(config).items():
        count = torch.Size(shape).numel()
        result[name] = torch.arange(start, start + count, dtype=torch.float32).reshape(shape)
        start += count
    return result


def tensors_of(table: Mapping[str, Held], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The local tensors of one rank of a layout."""
    result = {}
    for name, held in table.items():
        tensor = torch.full(held.shape, float("nan"), dtype=held.dtype)
        for s in held.slices:
            box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
            tensor[s.offset : s.offset + s.rows] = whole[s.name][box]
        assert not tensor.isnan().any()
        result[name] = tensor
    return result
