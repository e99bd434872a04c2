"""Extra attention heads that compute nothing, so that a tensor-parallel degree divides them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.config import ModelConfig, resized
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import TensorSource, open_model
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice


def pad_heads(source: str | Path, out_dir: str | Path, heads: str) -> ModelConfig:
    """Write a model that computes the same as `source`, with more heads.

    The new heads come last, with weights of 0: their values are 0, and `o_proj` ignores them. They
    train like others (their gradients are not all 0), so the padded model diverges from the
    original once it is updated.

    Args:
        heads: `QUERY/KV`, such as 12/4.

    Raises:
        ValueError: `heads` are not two numbers, are fewer than the model's, or change the number of
            query heads per key/value head (old heads would then get other partners).
    """
    config, weights = open_model(source)
    num_heads, num_kv_heads = _parse(heads)
    old = (config.attention.num_heads, config.attention.num_kv_heads)
    if num_heads < old[0] or num_kv_heads < old[1]:
        raise ValueError(f"--pad-heads-to {heads}: the model has {old[0]}/{old[1]} heads already")
    if num_heads * old[1] != num_kv_heads * old[0]:
        raise ValueError(
            f"--pad-heads-to {heads}: the model has {old[0]}/{old[1]} heads, "
            f"{old[0] / old[1]:g} queries to a key; pad to the same ratio"
        )
    described = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": config.attention.head_dim,
    }
    padded = resized(config, described)
    save_pretrained(_padded(weights, padded), padded, out_dir, source)
    return padded


def _parse(heads: str) -> tuple[int, int]:
    parts = heads.split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--pad-heads-to {heads!r}: write it as QUERY/KV, such as 12/4")
    return int(parts[0]), int(parts[1])


def _padded(weights: TensorSource, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, shape in global_shapes(model).items():
        old = weights.shape(name)
        whole = Slice(name=name, shape=old, start=(0,) * len(old), stop=old, offset=0)
        tensor = weights.read(whole)
        if old != shape:
            larger = torch.zeros(shape, dtype=tensor.dtype)
            larger[tuple(slice(0, size) for size in old)] = tensor
            tensor = larger
        yield name, tensor
