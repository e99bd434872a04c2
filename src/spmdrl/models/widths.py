"""Widths of a model on one rank, in elements per token, from which plans compute bytes."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import GatedDelta, LatentAttention, LayerSpec, Mixer, SoftmaxAttention
from spmdrl.models.tensors import heads_per_rank


@lru_cache(maxsize=16)  # plans ask for the same few models hundreds of times
def layer_kinds(model: ModelConfig) -> tuple[tuple[LayerSpec, int], ...]:
    """Return each kind of layer, with the number of layers of that kind."""
    return tuple(Counter(model.layers).items())


@lru_cache(maxsize=16)
def first_alike(model: ModelConfig) -> tuple[int, ...]:
    """Return for each layer the first one of its kind: they differ in the names of tensors only."""
    firsts: dict[LayerSpec, int] = {}
    return tuple(firsts.setdefault(spec, number) for number, spec in enumerate(model.layers))


def cached_values(model: ModelConfig, tp: int) -> int:
    """Count the elements that an engine's cache keeps of each token, over all layers."""
    return sum(number * _cached(spec.mixer, tp) for spec, number in layer_kinds(model))


def state_values(model: ModelConfig, tp: int) -> int:
    """Count the elements that an engine keeps of each sequence, over all layers: the states and the
    windows of linear attention.
    """
    return sum(number * _state(spec.mixer, tp) for spec, number in layer_kinds(model))


def heads_width(model: ModelConfig, tp: int) -> int:
    """Count a token's queries, keys and values in the layer that has most."""
    return max(mixer_width(spec.mixer, tp) for spec, _ in layer_kinds(model))


def engine_heads_width(model: ModelConfig, tp: int) -> int:
    """Count in an engine what `heads_width` counts in a trainer: latent attention has queries and
    results as wide as the latent vectors there.
    """
    return max(_engine_width(spec.mixer, tp) for spec, _ in layer_kinds(model))


def keys_values_width(model: ModelConfig, tp: int) -> int:
    """Count a token's keys and values in the layer that has most."""
    return max(keys_values_of(spec.mixer, tp) for spec, _ in layer_kinds(model))


def _cached(mixer: Mixer, tp: int) -> int:
    if isinstance(mixer, GatedDelta):
        return 0
    if isinstance(mixer, LatentAttention):
        return mixer.kv_rank + mixer.rope_dim  # one latent vector for all heads, on every rank
    return 2 * heads_per_rank(mixer.num_kv_heads, tp) * mixer.head_dim


def _state(mixer: Mixer, tp: int) -> int:
    if not isinstance(mixer, GatedDelta):
        return 0
    state = mixer.num_v_heads * mixer.head_dim * mixer.v_dim
    channels = 2 * mixer.num_heads * mixer.head_dim + mixer.num_v_heads * mixer.v_dim
    return (state + channels * (mixer.conv_size - 1)) // tp


def _engine_width(mixer: Mixer, tp: int) -> int:
    if isinstance(mixer, LatentAttention):
        kept = mixer.kv_rank + mixer.rope_dim
        return mixer.num_heads * (kept + mixer.kv_rank) // tp + kept
    return mixer_width(mixer, tp)


def mixer_width(mixer: Mixer, tp: int) -> int:
    """Count a token's queries, keys and values in a layer with this mixer, and its gates."""
    queries = mixer.num_heads * mixer.head_dim
    if isinstance(mixer, GatedDelta):
        queries += mixer.num_v_heads * mixer.v_dim
    elif isinstance(mixer, SoftmaxAttention) and mixer.gate:
        queries *= 2
    return queries // tp + keys_values_of(mixer, tp)


def keys_values_of(mixer: Mixer, tp: int) -> int:
    """Count a token's keys and values in a layer with this mixer."""
    if isinstance(mixer, LatentAttention):
        return mixer.num_heads * (mixer.head_dim + mixer.v_dim) // tp
    if isinstance(mixer, GatedDelta):
        return (mixer.num_heads * mixer.head_dim + mixer.num_v_heads * mixer.v_dim) // tp
    return 2 * heads_per_rank(mixer.num_kv_heads, tp) * mixer.head_dim
