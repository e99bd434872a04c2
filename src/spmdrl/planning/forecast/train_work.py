"""Work of one rank of a model's role: reading rows, and updates with their optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from spmdrl.models.local_shards import Table, counted
from spmdrl.planning.forecast.collectives import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    expert_group,
    group_along,
    send,
)
from spmdrl.planning.forecast.shapes import RankShapes
from spmdrl.planning.forecast.streams import Stream
from spmdrl.planning.forecast.work import NOTHING, Work
from spmdrl.planning.systems.protocol import Traffic
from spmdrl.planning.systems.registry import train_system
from spmdrl.role_spec import RoleSpec

_FORWARD_LAUNCHES, _EXPERT_LAUNCHES = 16, 24
"""Kernels of a layer's forward pass, and those that experts add (sorts, counts, gathers)."""

_HEAD_LAUNCHES = 14
"""Kernels for a chunk of logits, see `training.logprobs`."""

_LOGIT_PASSES = 6
"""Accesses to each float32 logit in a forward pass, and in a backward pass."""

_ADAMW_BYTES = 4 * 8
"""Bytes of a step per trained value: the gradient twice (norm, update), both moments and the master
read and written."""


@dataclass(frozen=True, kw_only=True)
class TrainRank:
    """One rank of a model's role.

    Args:
        shapes: what it computes with.
        table, states: its tensors, and its masters and moments.
        node_size: ranks of a node.
        repeats: whether what a backward pass computes again counts.
    """

    spec: RoleSpec
    shapes: RankShapes
    table: Table
    states: Table
    node_size: int
    repeats: bool = True

    @property
    def itemsize(self) -> int:
        return self.spec.dtype.itemsize

    @cached_property
    def optimizer_sizes(self) -> tuple[int, int, int]:
        """Values of its masters; bytes of the weights in their own narrow dtype; values of the
        weights that train.
        """
        trained = sum(
            math.prod(held.shape) * count for held, count in counted(self.states) if not held.frozen
        )
        own = [(held, count) for held, count in counted(self.table) if not held.frozen]
        weights = sum(held.num_bytes * count for held, count in own if held.dtype.itemsize < 4)
        return trained, weights, sum(math.prod(held.shape) * count for held, count in own)

    @cached_property
    def trained_share(self) -> float:
        """Share of the values of its own matrices that train."""
        sizes = [(math.prod(held.shape) * n, held.frozen) for held, n in counted(self.table)]
        trained = sum(size for size, frozen in sizes if not frozen)
        return trained / max(1, sum(size for size, _ in sizes))

    @property
    def shard(self) -> Group:
        """The ranks that weights are gathered with: data shards, and cp, which has the same
        weights.
        """
        return self.group(*self.traffic.shard_axes)

    @property
    def traffic(self) -> Traffic:
        return train_system(self.spec).traffic(self.spec)

    def group(self, *axes: str) -> Group:
        return group_along(self.spec.placement, axes, self.node_size)


def read_work(rank: TrainRank, stream: Stream) -> Work:
    """Work of a forward pass without gradients over the rows."""
    return _forward(rank, stream) + _head(rank, stream) + _gathers(rank, stream.microbatches)


def update_work(rank: TrainRank, stream: Stream) -> Work:
    """Work of an update over a minibatch, including its optimizer step."""
    work = _forward(rank, stream) + _backward(rank, stream)
    if rank.spec.train.recompute == "layer" and rank.repeats:
        tokens = stream.tokens / rank.spec.placement.degrees["cp"]
        work += _forward(rank, stream) + Work(flops={"matmul": -2 * rank.shapes.last * tokens})
    work += _head(rank, stream) + _head_backward(rank, stream)
    gathers = _gathers(rank, stream.microbatches)
    work += gathers * 2 + _reductions(rank, stream.microbatches)
    return work + optimizer_work(rank)


def bubble(rank: TrainRank, stream: Stream) -> float:
    """Seconds of a pipeline per second of a stage's work: it fills and drains once per minibatch
    (https://arxiv.org/abs/2104.04473, section 2.2).
    """
    pp = rank.spec.placement.degrees["pp"]
    chunks = int(rank.spec.section.megatron.get("vpp", 1))
    return 1 + (pp - 1) / (chunks * max(1, stream.microbatches))


def optimizer_work(rank: TrainRank) -> Work:
    """Work of an optimizer step: sums of gradients over replicas, their norm, AdamW, the weights
    in their own dtype.
    """
    trained, weights, own = rank.optimizer_sizes
    work = Work(memory_bytes=weights, launches=60)
    if rank.traffic.offload == "none":
        work += Work(memory_bytes=_ADAMW_BYTES * trained)
    else:  # gradients to the host, AdamW there, and the weights back
        host = (4.0 + rank.itemsize) * trained
        work += Work(link_bytes={"host": host, "copy": float(_ADAMW_BYTES * trained)})
    traffic, everyone = rank.traffic, rank.group("dp_replicate", "dp_shard", "cp")
    if traffic.shards_optimizer:
        work += all_gather(everyone, float(own * rank.itemsize))
    if not traffic.reduces_microbatches:
        whole = traffic.sums_whole or not traffic.shards_optimizer
        work += (all_reduce if whole else all_gather)(everyone, 4.0 * own)
    elif "dp_replicate" not in traffic.shard_axes:
        work += all_reduce(rank.group("dp_replicate"), 4.0 * own)
    return work + all_reduce(rank.group("pp", "dp_replicate", "dp_shard", "cp", "tp"), 8.0)


def _forward(rank: TrainRank, stream: Stream) -> Work:
    """Layers' forward pass: 2 operations per multiplication of elements, pairs and states."""
    shapes, cp = rank.shapes, rank.spec.placement.degrees["cp"]
    tokens = stream.tokens / cp
    elements = shapes.dense + shapes.routed + shapes.added
    return Work(
        flops={"matmul": 2 * elements * tokens, "attention": 2 * _mixed(shapes, stream) / cp},
        memory_bytes=_layer_bytes(rank, stream),
        launches=_launches(shapes) * stream.microbatches,
    ) + _messages(rank, stream)


def _backward(rank: TrainRank, stream: Stream) -> Work:
    """Layers' backward pass: gradients of inputs, and of the matrices that train; attention's five
    products of which two were computed before (https://arxiv.org/abs/2205.14135).
    """
    shapes, cp = rank.shapes, rank.spec.placement.degrees["cp"]
    tokens, fixed = stream.tokens / cp, rank.spec.has_fixed_base
    elements = shapes.dense + shapes.routed
    products = elements * (1 + (0 if fixed else rank.trained_share)) + 2 * shapes.added
    if fixed:  # nothing below the first layer's projections trains
        products -= shapes.first + shapes.added_first
    sums = 0 if fixed else 8 * elements * rank.trained_share * stream.microbatches
    return Work(
        flops={"matmul": 2 * products * tokens, "attention": 5 * _mixed(shapes, stream) / cp},
        memory_bytes=2 * _layer_bytes(rank, stream) + sums,
        launches=2 * _launches(shapes) * stream.microbatches,
    ) + _messages(rank, stream)


def _mixed(shapes: RankShapes, stream: Stream) -> float:
    """Multiplications of tokens with others, and with states, in a forward pass."""
    return shapes.total(
        lambda mixer: (
            mixer.scored * mixer.seen(stream.tokens, stream.pairs)
            + (mixer.stepped + mixer.chunked) * stream.tokens
        )
    )


def _layer_bytes(rank: TrainRank, stream: Stream) -> float:
    """Bytes of activations, and of the weights once per microbatch."""
    shapes, cp = rank.shapes, rank.spec.placement.degrees["cp"]
    values = shapes.layers * shapes.layer_values() * stream.tokens / cp
    weights = (shapes.dense + shapes.experts + shapes.held_added) * stream.microbatches
    return (values + weights) * rank.itemsize


def _launches(shapes: RankShapes) -> float:
    own = _FORWARD_LAUNCHES * shapes.layers + _EXPERT_LAUNCHES * shapes.expert_layers
    return own + (4 * shapes.layers if shapes.added else 0)


def _messages(rank: TrainRank, stream: Stream) -> Work:
    """Messages of the layers in one direction: over tp (sums), cp (keys and values), ep (tokens)
    and pp.
    """
    spec, shapes, degrees = rank.spec, rank.shapes, rank.spec.placement.degrees
    tokens = stream.tokens / degrees["cp"] / max(1, stream.microbatches)
    hidden = tokens * shapes.width * rank.itemsize
    work = NOTHING
    if degrees["tp"] > 1:
        work += all_reduce(rank.group("tp"), hidden) * (2 * shapes.layers + 1)
    if degrees["cp"] > 1:
        values = shapes.total(lambda mixer: mixer.gathered) / shapes.layers * tokens * degrees["cp"]
        work += all_gather(rank.group("cp"), values * rank.itemsize) * shapes.layers
    columns = math.gcd(degrees["tp"], degrees["ep"])
    if degrees["ep"] // columns > 1:
        rows = tokens * shapes.top_k / columns * shapes.width * rank.itemsize
        work += all_to_all(expert_group(spec.placement, rank.node_size), rows) * (
            2 * shapes.expert_layers
        )
    if degrees["pp"] > 1:
        work += send(rank.group("pp"), hidden) * int(spec.section.megatron.get("vpp", 1))
    return work * stream.microbatches


def _head(rank: TrainRank, stream: Stream) -> Work:
    shapes, spec = rank.shapes, rank.spec
    places = stream.places / spec.placement.degrees["cp"]
    logits = places * (shapes.head / shapes.width)
    chunks = math.ceil(places / spec.train.head_chunk) if spec.head == "lm" else 1
    work = Work(
        flops={"matmul": 2 * shapes.head * places},
        memory_bytes=4 * _LOGIT_PASSES * logits + chunks * shapes.head * rank.itemsize,
        launches=_HEAD_LAUNCHES * max(chunks, stream.microbatches),
    )
    return work + all_reduce(rank.group("tp"), 12 * places / stream.microbatches) * (
        stream.microbatches
    )


def _head_backward(rank: TrainRank, stream: Stream) -> Work:
    """The head's logits again, then the gradients of hidden states and of its own weight."""
    shapes, spec = rank.shapes, rank.spec
    places = stream.places / spec.placement.degrees["cp"]
    forward = _head(rank, stream)
    again = 1 if spec.head == "lm" and rank.repeats else 0
    trains = 1 if spec.head == "score" or not spec.has_fixed_base else 0
    work = Work(
        flops={"matmul": 2 * shapes.head * places * (1 + again + trains)},
        memory_bytes=forward.memory_bytes,
        launches=forward.launches,
    )
    if spec.head == "lm":
        work += all_reduce(rank.group("tp"), 4 * places * shapes.width)
    return work


def _gathers(rank: TrainRank, microbatches: int) -> Work:
    """Gathers of all weights in the dtype that computes, one per microbatch and pass."""
    if not rank.traffic.gathers_weights:
        return NOTHING
    work = _along_shards(rank, rank.itemsize, microbatches)
    if rank.traffic.offload == "all":
        held = sum(own.num_bytes * count for own, count in counted(rank.table))
        work += Work(link_bytes={"host": float(held * microbatches)})
    return work


def _reductions(rank: TrainRank, microbatches: int) -> Work:
    """Reduce-scatters of float32 gradients, one per microbatch."""
    if not rank.traffic.reduces_microbatches:
        return NOTHING
    return _along_shards(rank, 4, microbatches)


def _along_shards(rank: TrainRank, itemsize: int, microbatches: int) -> Work:
    """Gather all weights, layer by layer; those outside layers count as one."""
    shapes = rank.shapes
    units = shapes.layers + 1
    dense = all_gather(rank.shard, (shapes.held - shapes.experts) * itemsize / units)
    experts = all_gather(_expert_shard(rank), shapes.experts * itemsize / units)
    return (dense + experts) * (units * microbatches)


def _expert_shard(rank: TrainRank) -> Group:
    degrees = rank.spec.placement.degrees
    columns = math.gcd(degrees["tp"], degrees["ep"])
    outer = degrees["ep"] // columns
    size = max(1, degrees["dp_shard"] * degrees["cp"] // outer)
    return group_along(rank.spec.placement, ("cp",), rank.node_size, stride=outer, size=size)
