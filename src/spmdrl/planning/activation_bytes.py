"""Device memory of a model's call in addition to parts, estimated from shapes.

The estimate is an upper bound for usual shapes, fitted to measurements of
`tests/planning/test_activation_bytes.py`. Values are counted per token and layer: the residual
stream and the norms' (whole on all tensor-parallel ranks, unless Megatron's sequence parallelism
splits them), queries, keys, values, attention's output, the MLP's.

Pipeline stages hold as many microbatches as there are stages, each in its own layers: together
those of one microbatch in all layers, and more if runs of layers are interleaved. Both are as in
Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), sections 4.2.2 and 4.2.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.distributed.mesh import expert_degrees
from spmdrl.models.adapters import share_of_tokens
from spmdrl.models.sharding import global_shapes
from spmdrl.models.specs import DenseMlp, GatedDelta, LayerSpec, MoeMlp
from spmdrl.models.widths import (
    heads_width,
    keys_values_of,
    keys_values_width,
    layer_kinds,
    mixer_width,
)
from spmdrl.placement import kept_megatron
from spmdrl.planning import delta_bytes
from spmdrl.role_spec import RoleSpec
from spmdrl.training.logprobs import cpu_tile


@dataclass(frozen=True, kw_only=True)
class _SequenceSplit:
    """Tensor-parallel ranks over which Megatron's sequence parallelism splits a replica's tokens.

    Args:
        stream: number of ranks that share the residual stream and the norms.
        rows: number of ranks that share the rows that go to experts.
    """

    stream: int = 1
    rows: int = 1

    @property
    def gathered(self) -> int:
        """Copies of the whole stream that exist where a product reads it."""
        return int(self.stream > 1)


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
    """Bytes of activations and logits; gradients and gathered parameters are not included, see
    `systems.train_memory`.

    Args:
        tokens: packed tokens that a replica computes at once.
        backward: a forward and a backward pass; else a forward pass without gradients.
    """
    model, dtype, degrees = spec.model, spec.dtype, spec.placement.degrees
    cp, tp = degrees["cp"], degrees["tp"]
    own = -(-tokens // (2 * cp)) * 2  # each rank takes two chunks of 2 cp
    heads = heads_width(model, tp)
    # keys and values of all ranks
    gathered = cp * keys_values_width(model, tp) if cp > 1 else 0
    width, split = model.hidden_size, _split(spec)
    scores = 4 * own * width * dtype.itemsize
    if spec.head == "lm":
        copies = _LOGITS + (model.logit_softcap is not None)  # slopes of the cap
        scores += copies * _logits(spec, own) * 4
    if not backward:
        values = forward_values(spec, heads, gathered)
        total = max(int(own * values) * dtype.itemsize, scores)
    else:
        kept = _kept(spec)
        layers = {one: own * _layer_values(spec, one, kept) for one, _ in layer_kinds(model)}
        inputs = model.num_layers * own * width / split.stream
        every = sum(number * layers[one] for one, number in layer_kinds(model))
        held = (inputs if spec.train.recompute == "layer" else every) * _in_flight(spec)
        again = 1.1 if spec.train.recompute == "layer" else 0.3
        last = max(again * layers[one] + own * _rule(spec, one, kept) for one in layers)
        last += 2 * split.gathered * own * width  # a product's input and its gradient
        added = own * _added(spec)
        if spec.train.recompute == "layer":
            last += added / model.num_layers
        else:
            held += added
        # the head's gradient, in addition to the embedding's if they are tied
        if spec.head == "lm" and not spec.has_fixed_base:
            scores += model.vocab_size // tp * width * 4
        total = int(held) * dtype.itemsize + max(int(last) * dtype.itemsize, scores)
    return total


def _layer_values(spec: RoleSpec, layer: LayerSpec, kept: _Values) -> float:
    """Values per token that a layer keeps for its backward pass."""
    degrees, width, split = spec.placement.degrees, spec.model.hidden_size, _split(spec)
    tp, cp = degrees["tp"], degrees["cp"]
    if isinstance(layer.mixer, GatedDelta):
        heads = delta_bytes.held_values(layer.mixer, spec)
    else:
        heads = kept.heads * mixer_width(layer.mixer, tp)
    gathered = cp * keys_values_of(layer.mixer, tp) if cp > 1 else 0
    stream = kept.stream * width / split.stream
    return stream + heads + _mlp(layer.mlp, width, tp, kept.mlp, split.rows) + gathered


def _split(spec: RoleSpec) -> _SequenceSplit:
    degrees = spec.placement.degrees
    if not kept_megatron(spec.section, spec.placement).get("sp", False):
        return _SequenceSplit()
    return _SequenceSplit(stream=degrees["tp"], rows=expert_degrees(degrees)["ep_tp"])


def _in_flight(spec: RoleSpec) -> float:
    """Layers whose values the first pipeline stage holds, per layer of the model: an interleaved
    schedule begins with 2 (pp - 1) + (vpp - 1) pp runs of layers before the one whose gradients
    come first.
    """
    vpp = kept_megatron(spec.section, spec.placement).get("vpp", 1)
    if vpp == 1:
        return 1.0
    pp = spec.placement.degrees["pp"]
    return 1 + (pp - 1) / (pp * vpp)


def _rule(spec: RoleSpec, layer: LayerSpec, kept: _Values) -> float:
    """Values per token that the backward pass of a recurrent layer has in addition to what is kept;
    by then that of its MLP is over.
    """
    if not isinstance(layer.mixer, GatedDelta):
        return 0.0
    mlp = _mlp(layer.mlp, spec.model.hidden_size, spec.placement.degrees["tp"], kept.mlp)
    return max(0.0, delta_bytes.rule_values(layer.mixer, spec, backward=True) - mlp)


def forward_values(spec: RoleSpec, heads: int, gathered: int = 0) -> float:
    """Values per token that exist at once in a forward pass without gradients.

    Args:
        heads: a rank's width of queries, keys and values.
        gathered: values per token that it has of other ranks.
    """
    model, tp, split = spec.model, spec.placement.degrees["tp"], _split(spec)
    stream = (_FORWARD.stream / split.stream + split.gathered) * model.hidden_size
    mlps = (spec.mlp for spec, _ in layer_kinds(model))
    most = max(_mlp(mlp, model.hidden_size, tp, _FORWARD.mlp, split.rows) for mlp in mlps)
    mixers = max(_FORWARD.heads * heads + 2 * gathered, delta_bytes.forward_values(spec))
    return stream + max(mixers, most)


def _logits(spec: RoleSpec, tokens: int) -> int:
    """Logits that exist at once, see `training.logprobs`."""
    chunk = min(spec.train.head_chunk, tokens)
    every = chunk * (spec.model.vocab_size // spec.placement.degrees["tp"])
    return every if spec.device_type == "cuda" else min(every, cpu_tile(chunk))


def _mlp(mlp: DenseMlp | MoeMlp, hidden: int, tp: int, factor: float, ranks: int = 1) -> float:
    """Values per token of a layer's MLP, or of as many experts as a token is sent to, whose rows
    `ranks` ranks share.
    """
    if isinstance(mlp, DenseMlp):
        return factor * mlp.width / tp
    # a row for every choice: as it is sent, computed, put back and weighted
    row = factor * mlp.width / tp + 4 * hidden / ranks
    shared = 0 if mlp.shared is None else factor * mlp.shared.width / tp
    return mlp.top_k * row + 2 * mlp.num_experts + shared


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
