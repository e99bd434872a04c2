"""Working memory of gated DeltaNet layers, in values per token.

The counts of the rule in plain torch are fitted to what CUDA's allocator gave for rows of 60 to
8,192 tokens. Those of the kernels are not measured: they are read off the tensors that
flash-linear-attention makes in `chunk_gated_delta_rule_fwd` and `chunk_gated_delta_rule_bwd`
(https://github.com/fla-org/flash-linear-attention, fla/ops/gated_delta_rule/chunk.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.models.blocks.delta_kernels import serves
from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import GatedDelta
from spmdrl.models.widths import layer_kinds
from spmdrl.role_spec import RoleSpec

_CHUNK = 64
"""Tokens of a chunk."""


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Values that exist at once while a layer's rule is computed, per token.

    Args:
        channels: multiples of the width of queries, keys and values.
        heads: multiples of the width of all value heads' keys and values.
        chunk: multiples of a chunk's tokens, for each value head: scores, decays and the
            triangular system.
        states: multiples of a state, for each chunk.
    """

    channels: float
    heads: float
    chunk: float
    states: float


_PLAIN_FORWARD = _Rule(channels=5, heads=0.3, chunk=5.8, states=1.3)
_PLAIN_BACKWARD = _Rule(channels=9.4, heads=1.2, chunk=4.8, states=1.1)
"""Float32 values, whatever the layer's dtype."""

_KERNELS_FORWARD = _Rule(channels=4.6, heads=2, chunk=1, states=1)
_KERNELS_BACKWARD = _Rule(channels=1, heads=6, chunk=1, states=2)
"""Values in the layer's dtype."""

_KEPT_STATES = 2
"""Multiples of a state, for each chunk, that an engine has in plain torch: it keeps those of all
chunks, and selects the ones at the rows' ends.
"""


def held_values(mixer: GatedDelta, spec: RoleSpec) -> float:
    """Count what a layer keeps for its backward pass, in its own dtype: its projections, the rule's
    output and, in float32, its norm and gate; with the kernels also their inputs and systems.
    """
    tp, itemsize = spec.placement.degrees["tp"], spec.dtype.itemsize
    values = mixer.num_v_heads * mixer.v_dim / tp
    wide = 1 if itemsize >= 4 else (2 if spec.device_type == "cuda" else 4)
    held = _channels(mixer, tp) + (4 + wide * 4 / itemsize) * values
    if serves(spec.device, spec.dtype):
        held += _channels(mixer, tp) + _CHUNK * mixer.num_v_heads / tp
    return held


def rule_values(mixer: GatedDelta, spec: RoleSpec, *, backward: bool) -> float:
    """Count what exists, in the layer's dtype, while its rule is computed, in addition to what it
    keeps.
    """
    tp = spec.placement.degrees["tp"]
    if serves(spec.device, spec.dtype):
        return _count(mixer, _KERNELS_BACKWARD if backward else _KERNELS_FORWARD, tp)
    counts = _count(mixer, _PLAIN_BACKWARD if backward else _PLAIN_FORWARD, tp)
    return counts * 4 / spec.dtype.itemsize


def forward_values(spec: RoleSpec) -> float:
    """Count what exists, in the model's dtype, in the recurrent layer that has most; 0 without."""
    mixers = recurrent_mixers(spec.model)
    return max((_forward_values(mixer, spec) for mixer in mixers), default=0.0)


def _forward_values(mixer: GatedDelta, spec: RoleSpec) -> float:
    tp = spec.placement.degrees["tp"]
    inputs = _channels(mixer, tp) + mixer.num_v_heads * mixer.v_dim / tp
    values = inputs + rule_values(mixer, spec, backward=False)
    if spec.has_engine and not serves(spec.device, spec.dtype):
        values += _KEPT_STATES * _states(mixer, tp) * 4 / spec.dtype.itemsize
    return values


def step_bytes(model: ModelConfig, tp: int) -> int:
    """Count the bytes, per sample, of the states that an engine's step has in the layer that has
    most; 0 without.
    """
    states = (m.num_v_heads * m.head_dim * m.v_dim // tp for m in recurrent_mixers(model))
    return 4 * max(states, default=0)


def recurrent_mixers(model: ModelConfig) -> list[GatedDelta]:
    """Return the mixers of all kinds of recurrent layers."""
    mixers = (layer.mixer for layer, _ in layer_kinds(model))
    return [mixer for mixer in mixers if isinstance(mixer, GatedDelta)]


def _count(mixer: GatedDelta, rule: _Rule, tp: int) -> float:
    heads = rule.heads * (mixer.head_dim + mixer.v_dim) + rule.chunk * _CHUNK
    return (
        rule.channels * _channels(mixer, tp)
        + heads * mixer.num_v_heads / tp
        + rule.states * _states(mixer, tp)
    )


def _states(mixer: GatedDelta, tp: int) -> float:
    """Count the values of one state for each chunk."""
    return mixer.num_v_heads * mixer.head_dim * mixer.v_dim / tp / _CHUNK


def _channels(mixer: GatedDelta, tp: int) -> float:
    return (2 * mixer.num_heads * mixer.head_dim + mixer.num_v_heads * mixer.v_dim) / tp
