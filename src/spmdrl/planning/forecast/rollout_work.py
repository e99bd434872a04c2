"""Work of one rank of a rollout or a judge: prompts once per group, then decode steps.

A replica decodes `running` rows together, and starts a waiting one when one ends. While rows wait,
all places are taken; from then on the rows that are left end one by one, and the longest response
decides the number of steps. Steps are counted in a few segments of about equally many rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spmdrl.config.sections import Config
from spmdrl.models.widths import cached_values
from spmdrl.planning.engines import samples_per_replica
from spmdrl.planning.forecast.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    expert_group,
    group_along,
)
from spmdrl.planning.forecast.mixers import MixerShape
from spmdrl.planning.forecast.shapes import RankShapes
from spmdrl.planning.forecast.step import Lengths
from spmdrl.planning.forecast.streams import squared, survival
from spmdrl.planning.forecast.work import Product, Work
from spmdrl.planning.parts import cache_bytes
from spmdrl.planning.questions import questions_of
from spmdrl.role_spec import RoleSpec

_SEGMENTS = 8

_SAMPLE_PASSES = 8
"""Accesses to each float32 logit: written, gathered, softmax, noise, quotient, its maximum."""

_CPU_LOGITS = 600
"""Logits from which a CPU draws in the time of a library call; exponentials bound it."""

_GRAPH_LAUNCHES, _SAMPLE_LAUNCHES = 4, 24
"""Kernels of a step around its graph, and of drawing tokens."""

_LAYER_LAUNCHES, _EXPERT_LAUNCHES = 14, 16

_STATE_BYTES = 4
"""Bytes of a value of a state, which is float32."""

_WAITS, _ROWS_A_WAIT = 2.0, 64
"""Times per decode step that host and device wait for one another: inputs go, drawn tokens come;
rows whose bookkeeping on the host takes as long as one of these.
"""


@dataclass(frozen=True, kw_only=True)
class RolloutRank:
    """One rank of a rollout.

    Args:
        shapes: what it computes with.
        captures: whether decode steps are replayed as graphs.
        node_size: ranks of a node.
    """

    spec: RoleSpec
    shapes: RankShapes
    captures: bool
    node_size: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Decode steps with about equally many rows.

    Args:
        steps: number of steps.
        rows: rows of each.
        context: tokens that a row sees, on average.
    """

    steps: float
    rows: float
    context: float


def generated_lengths(config: Config, spec: RoleSpec, lengths: Lengths) -> Lengths:
    """Lengths of what an engine generates: a step's, or a judge's questions about its rows. Answers
    are taken to be as long as they may be.
    """
    if not spec.is_judge:
        return lengths
    asked = questions_of(config, spec.name, spec.model.max_position)
    texts = lengths.prompt + lengths.response * (2 if asked.pairs else 1)
    question = min(float(asked.prompt_tokens), asked.template_tokens + texts)
    answer = float(asked.answer_tokens)
    return Lengths(prompt=question, response=answer, longest=answer)


def generated_samples(config: Config, spec: RoleSpec) -> float:
    """Samples of a step that a replica generates; a judge's answers."""
    if not spec.is_judge:
        return samples_per_replica(config, spec)
    asked = questions_of(config, spec.name, spec.model.max_position)
    return math.ceil(asked.count * asked.samples / spec.placement.num_replicas)


def running_rows(config: Config, spec: RoleSpec, lengths: Lengths) -> float:
    """Rows that a replica decodes together: its samples, `max_running`, or what its cache holds."""
    samples = generated_samples(config, spec)
    most = min(samples, config.rollout.max_running)
    token = cached_values(spec.model, spec.placement.degrees["tp"]) * spec.dtype.itemsize
    if not token:
        return max(1.0, most)
    needed = lengths.prompt + lengths.response / 2
    room = cache_bytes(config, spec) / (token * max(1.0, needed))
    return max(1.0, min(most, room))


def decode_segments(samples: float, running: float, lengths: Lengths) -> Iterator[Segment]:
    """The decode steps of a replica, see the module; the first token comes with the prompt."""
    prompt, mean, longest = lengths.prompt, lengths.response, max(lengths.longest, lengths.response)
    full = max(0.0, samples - running) * mean / running
    if full > 0:
        middle = prompt + squared(lengths) / max(1.0, mean) / 2
        yield Segment(steps=full, rows=running, context=middle)
    width = (longest - 1) / _SEGMENTS
    if width <= 0:
        return
    # the rows of each segment hold the responses' tokens together: S at its middle, scaled
    shares = [survival(lengths, (i + 0.5) * width + 0.5) for i in range(_SEGMENTS)]
    scale = max(0.0, mean - 1) / max(1e-9, width * sum(shares))
    for i, share in enumerate(shares):
        rows = max(1.0, running * min(1.0, share * scale))
        yield Segment(steps=width, rows=rows, context=prompt + 1 + (i + 0.5) * width)


def prefill_work(rank: RolloutRank, config: Config, lengths: Lengths) -> Work:
    """Work of computing the prompts, each once for its group, in steps of `prefill_tokens`."""
    shapes, groups = rank.shapes, _groups(config, rank.spec)
    tokens = groups * lengths.prompt
    steps = max(1.0, math.ceil(tokens / config.rollout.prefill_tokens))
    pairs = groups * lengths.prompt * (lengths.prompt + 1) / 2
    mixed = shapes.total(
        lambda mixer: (
            mixer.engine_scored * mixer.seen(tokens, pairs)
            + (mixer.stepped + mixer.chunked) * tokens
        )
    )
    work = _layers_work(rank, tokens / steps, mixed / steps, kind="matmul", captures=False)
    values = shapes.layers * shapes.layer_values() * tokens / steps * rank.spec.dtype.itemsize
    return (work + Work(memory_bytes=values)) * steps + _sampled(rank, groups)


def decode_work(rank: RolloutRank, segment: Segment) -> Work:
    """Work of one decode step."""
    shapes, rows = rank.shapes, segment.rows

    def seen(mixer: MixerShape) -> float:
        context = segment.context
        return context if mixer.window is None else min(context, mixer.window)

    read = shapes.total(lambda mixer: mixer.cached * seen(mixer)) * rank.spec.dtype.itemsize
    states = 2 * _STATE_BYTES * shapes.total(lambda mixer: mixer.state)
    mixed = rows * shapes.total(lambda mixer: mixer.engine_scored * seen(mixer) + mixer.stepped)
    layers = _layers_work(rank, rows, mixed, kind="decode", captures=rank.captures)
    return layers + Work(memory_bytes=rows * (read + states)) + _sampled(rank, rows)


def read_bytes(rank: RolloutRank, rows: float) -> float:
    """Bytes of the weights that a step reads: all but the experts that no row is sent to."""
    shapes = rank.shapes
    size = shapes.dense + shapes.held_added
    if shapes.num_experts:
        unused = (1 - shapes.top_k / shapes.num_experts) ** rows
        size += shapes.experts * (1 - unused)
    return size * rank.spec.dtype.itemsize


def _groups(config: Config, spec: RoleSpec) -> float:
    """Prompts that a replica computes; it has whole groups if there are enough."""
    if spec.is_judge:
        asked = questions_of(config, spec.name, spec.model.max_position)
        return max(1.0, math.ceil(asked.count / spec.placement.num_replicas))
    return max(1.0, math.ceil(config.data.prompts_per_step / spec.placement.num_replicas))


def _layers_work(
    rank: RolloutRank, tokens: float, mixed: float, *, kind: Product, captures: bool
) -> Work:
    """Work of all layers; `mixed` are the multiplications of their mixers."""
    shapes, spec = rank.shapes, rank.spec
    launches = _LAYER_LAUNCHES * shapes.layers + _EXPERT_LAUNCHES * shapes.expert_layers
    work = Work(
        flops={
            kind: 2 * (shapes.dense + shapes.routed + shapes.added) * tokens,
            "attention": 2 * mixed,
        },
        memory_bytes=read_bytes(rank, tokens),
        launches=_GRAPH_LAUNCHES if captures else launches,
        messages={"host": _WAITS + tokens / _ROWS_A_WAIT} if captures else {},
    )
    hidden = tokens * shapes.width * spec.dtype.itemsize
    tp = group_along(spec.placement, ("tp",), rank.node_size)
    work += all_reduce(tp, hidden) * (2 * shapes.layers + 1)
    others = expert_group(spec.placement, rank.node_size)
    columns = spec.placement.degrees["ep"] // others.size
    rows = hidden * shapes.top_k / columns
    return work + all_to_all(others, rows) * (2 * shapes.expert_layers)


def _sampled(rank: RolloutRank, rows: float) -> Work:
    """Logits of rows, on every rank of tp those of the whole vocabulary, and drawn tokens."""
    shapes, spec = rank.shapes, rank.spec
    drawn = rows * spec.model.vocab_size
    logits = 4.0 * drawn
    work = Work(
        flops={"decode": 2 * shapes.head * rows},
        memory_bytes=_SAMPLE_PASSES * logits + shapes.head * spec.dtype.itemsize,
        launches=_SAMPLE_LAUNCHES + (0 if spec.device_type == "cuda" else drawn / _CPU_LOGITS),
    )
    return work + all_gather(group_along(spec.placement, ("tp",), rank.node_size), logits)
