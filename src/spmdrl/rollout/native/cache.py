"""Sizes of the key-value cache: what every layer keeps of a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import AttentionOptions, GatedDelta, LatentAttention, Mixer
from spmdrl.models.tensors import heads_per_rank


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Keys and values that one layer keeps of each token, and its attention over them.

    Blocks that no window can reach any more are not freed: a sample has one list of blocks for all
    of its layers.

    Args:
        heads, kv_heads: those of a rank.
        key_width, value_width: dims of a head's key and value.
        values_in_keys: whether a value is the first `value_width` dims of its key, and not stored
            again (the latent cache of `LatentAttention`).
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    options: AttentionOptions
    values_in_keys: bool = False

    @property
    def group(self) -> int:
        """Number of query heads per key-value head."""
        return self.heads // self.kv_heads

    @property
    def numbers(self) -> int:
        """Number of values that it stores of a token."""
        stored = self.key_width + (0 if self.values_in_keys else self.value_width)
        return self.kv_heads * stored


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of a rank's key-value cache.

    Args:
        layers: None where a layer keeps no keys and values (linear attention).
    """

    layers: tuple[LayerCache | None, ...]
    num_blocks: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        tokens = self.num_blocks * self.block_size
        return tokens * token_bytes(self.layers, self.dtype)

    def cached(self) -> Iterator[tuple[int, LayerCache]]:
        """Yield the layers that have a cache, with their numbers."""
        for number, layer in enumerate(self.layers):
            if layer is not None:
                yield number, layer


def token_bytes(layers: Sequence[LayerCache | None], dtype: torch.dtype) -> int:
    """Return the bytes of all layers' cache of one token."""
    return dtype.itemsize * sum(layer.numbers for layer in layers if layer is not None)


def layer_caches(model: ModelConfig, tp_size: int) -> tuple[LayerCache | None, ...]:
    """Return what a rank of `tp_size` keeps in every layer."""
    return tuple(layer_cache(spec.mixer, tp_size) for spec in model.layers)


def layer_cache(mixer: Mixer, tp_size: int) -> LayerCache | None:
    """Return what a rank of `tp_size` keeps in a layer with this mixer; None: no keys and values.

    Latent attention keeps the latent vector and the part of the key with rope, which all heads
    share.
    """
    if isinstance(mixer, GatedDelta):
        return None
    heads = mixer.num_heads // tp_size
    if isinstance(mixer, LatentAttention):
        return LayerCache(
            heads=heads,
            kv_heads=1,
            key_width=mixer.kv_rank + mixer.rope_dim,
            value_width=mixer.kv_rank,
            values_in_keys=True,
            options=mixer.options,
        )
    return LayerCache(
        heads=heads,
        kv_heads=heads_per_rank(mixer.num_kv_heads, tp_size),
        key_width=mixer.head_dim,
        value_width=mixer.head_dim,
        options=mixer.options,
    )
