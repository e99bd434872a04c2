"""Device memory of a model's call in addition to parts, estimated from shapes.

The estimate is an upper bound for usual shapes, fitted to measurements of
`tests/planning/test_activation_bytes.py`. Values are counted per token and layer: the residual
stream and the norms' (whole on all tensor-parallel ranks), queries, keys, values, attention's
output, the MLP's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from spmdrl.models.adapters import share_of_tokens
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import global_shapes, local_kv_heads, local_parameters
from spmdrl.role_spec import RoleSpec
from spmdrl.training.logprobs import cpu_tile


@dataclass(frozen=True, kw_only=True)
class _Values:
    """Values that a layer holds at once, per token.

    Args:
        stream: multiples of the hidden size.
        heads: multiples of the width of queries, keys and values.
        mlp: multiples of the MLP's width.
    """

    stream: float
    heads: float
    mlp: float


_FORWARD = _Values(stream=4, heads=5, mlp=4.2)
"""Values within a layer without gradients: attention's or the MLP's, whichever are more."""

_FUSED = _Values(stream=5, heads=2.5, mlp=3)
_CUDA = _Values(stream=5, heads=2.5, mlp=4.5)
_PLAIN = _Values(stream=13, heads=4, mlp=4.5)
"""Values kept for the backward pass: float32 on a CPU (`models.fused`); CUDA, whose norms are fused
too; narrow dtypes on a CPU, whose norms and rotations keep float32 copies.
"""

_LOGITS = 4
"""Copies of a chunk's logits, float32; the last ones are freed once the next ones exist."""


def working_bytes(spec: RoleSpec, tokens: int, *, backward: bool) -> int:
    """Bytes of activations, logits and, with FSDP, gathered parameters; gradients are not included.

    Args:
        tokens: packed tokens that a replica computes at once.
        backward: a forward and a backward pass; else a forward pass without gradients.
    """
    model, dtype, degrees = spec.model, spec.dtype, spec.placement.degrees
    cp, tp = degrees["cp"], degrees["tp"]
    own = -(-tokens // (2 * cp)) * 2  # each rank takes two chunks of 2 cp
    heads = (model.num_heads // tp + 2 * local_kv_heads(model, tp)) * model.head_dim
    # keys and values of all ranks
    gathered = cp * 2 * local_kv_heads(model, tp) * model.head_dim if cp > 1 else 0
    width = model.hidden_size
    scores = 4 * own * width * dtype.itemsize
    if spec.head == "lm":
        scores += _LOGITS * _logits(spec, own) * 4
    if not backward:
        attention = _FORWARD.stream * width + _FORWARD.heads * heads + 2 * gathered
        values = max(attention, _FORWARD.stream * width + _mlp(model, tp, _FORWARD.mlp))
        total = max(int(own * values) * dtype.itemsize, scores)
    else:
        kept = _kept(spec)
        mlp = _mlp(model, tp, kept.mlp)
        layer = own * (kept.stream * width + kept.heads * heads + mlp + gathered)
        inputs = model.num_layers * own * width
        held = inputs if spec.train.recompute == "layer" else model.num_layers * layer
        last = 1.1 * layer if spec.train.recompute == "layer" else 0.3 * layer
        added = own * _added(spec)
        if spec.train.recompute == "layer":
            last += added / model.num_layers
        else:
            held += added
        # the head's gradient, in addition to the embedding's if they are tied
        if spec.head == "lm" and not spec.has_fixed_base:
            scores += model.vocab_size // tp * width * 4
        total = int(held) * dtype.itemsize + max(int(last) * dtype.itemsize, scores)
    if degrees["dp_shard"] > 1:
        total += _gathered_bytes(spec, backward=backward and not spec.has_fixed_base)
    return total


def _logits(spec: RoleSpec, tokens: int) -> int:
    """Logits that exist at once, see `training.logprobs`."""
    chunk = min(spec.train.head_chunk, tokens)
    every = chunk * (spec.model.vocab_size // spec.placement.degrees["tp"])
    return every if spec.device_type == "cuda" else min(every, cpu_tile(chunk))


def _mlp(model: ModelConfig, tp: int, factor: float) -> float:
    """Values per token of a layer's MLP, or of as many experts as a token is sent to."""
    dense = factor * model.intermediate_size / tp
    if model.moe is None:
        return dense
    # a row for every choice: as it is sent, computed, put back and weighted
    row = factor * model.moe.intermediate_size / tp + 4 * model.hidden_size
    experts = model.moe.top_k * row + 2 * model.moe.num_experts
    return max(dense, experts) if len(model.moe.layers) < model.num_layers else experts


def _added(spec: RoleSpec) -> float:
    """Values per token that an adapter keeps in all layers: A x, and x again where it is masked."""
    if spec.adapter is None:
        return 0.0
    shapes, tp = global_shapes(spec.model), spec.placement.degrees["tp"]
    masked = sum(shapes[name][1] for name in spec.adapter.targets) if spec.adapter.dropout else 0
    ranks = (
        own.rank * share_of_tokens(spec.model, name) for name, own in spec.adapter.targets.items()
    )
    return sum(ranks) + masked / tp


def _kept(spec: RoleSpec) -> _Values:
    if spec.device_type == "cuda":
        return _CUDA
    return _FUSED if spec.dtype.itemsize >= 4 else _PLAIN


def _gathered_bytes(spec: RoleSpec, *, backward: bool) -> int:
    """Bytes that FSDP2 gathers: the parameters outside layers, and two layers; in a backward pass
    also their gradients, and the float32 buffer that is reduced.
    """
    degrees, size = spec.placement.degrees, spec.dtype.itemsize
    local = local_parameters(spec.model, degrees["tp"], spec.head, ep_size=degrees.get("ep", 1))
    sizes = {name: math.prod(shape) for name, shape in local.items()}
    layer = sum(values for name, values in sizes.items() if name.startswith("layers.0."))
    rest = sum(values for name, values in sizes.items() if not name.startswith("layers."))
    gathered = (rest + 2 * layer) * size
    return gathered + (max(rest, layer) * (size + 4) if backward else 0)
