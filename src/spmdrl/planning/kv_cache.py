"""Sizes of the native engine's key-value cache that a memory plan chooses from.

With `rollout.kv_cache_gb: auto` the cache holds all that a training step's samples can need. It is
smaller where the device has no room for that (samples then wait for others), and as large as
evaluations can use where that makes no other part move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from spmdrl.config.data_sets import (
    HELD_OUT,
    held_out_sets,
    longest_prompt,
    response_tokens,
    set_response_tokens,
)
from spmdrl.config.sections import Config
from spmdrl.memory.parts import Part, PartKey
from spmdrl.memory.plan import MemoryPlan, least_peak
from spmdrl.memory.schedule import PlannedCall
from spmdrl.models.linear import LEAST_CAPABILITY
from spmdrl.models.widths import cached_values
from spmdrl.planning.engines import longest_served, samples_per_replica
from spmdrl.planning.questions import judge_section
from spmdrl.planning.token_bounds import step_sizes
from spmdrl.role_spec import RoleSpec
from spmdrl.rollout.native.cache import layer_cache
from spmdrl.rollout.native.recurrent import StateShape, recurrent_layers, slots_needed
from spmdrl.rollout.native.varlen import BLOCK_MULTIPLE, pages_are_usable
from spmdrl.rollout.native.workspace import CPU_CACHE_GB
from spmdrl.rollout.requests import GB


@dataclass(frozen=True, kw_only=True)
class CacheSizes:
    """Sizes of a rank's cache in bytes.

    Args:
        step: all that the samples of a training step can need; each size counts the states of
            recurrent layers too.
        largest: what those of any call of the run can need.
        least: the longest sequence.
        block: one block; sizes are multiples of it, unless the configuration gives another.
    """

    step: int
    largest: int
    least: int
    block: int

    @property
    def is_given(self) -> bool:
        """Whether the configuration leaves no choice."""
        return self.least == self.step == self.largest


def cache_sizes(config: Config, spec: RoleSpec) -> CacheSizes:
    """The sizes of a rollout or a judge with the native engine."""
    rollout, model = config.rollout, spec.model
    size = judge_section(config, spec.name).kv_cache_gb if spec.is_judge else rollout.kv_cache_gb
    if size != "auto":
        given = int(size * GB)
        return CacheSizes(step=given, largest=given, least=given, block=1)
    tokens = block_tokens(config, spec)
    values = cached_values(model, spec.placement.degrees["tp"])
    block = max(1, values * spec.dtype.itemsize * tokens)  # there may be recurrent layers only
    longest = -(-longest_served(config, spec) // tokens)
    own = config.data.train.max_tokens + response_tokens(config)
    if config.data_kind() == "prompts":
        own = step_sizes(config).row_tokens
    # on CUDA the engine makes it once, for all calls
    each = longest if spec.device_type == "cuda" or spec.is_judge else -(-own // tokens)
    step = min(samples_per_replica(config, spec), rollout.max_running) * each
    largest = max([step, *_evaluation_blocks(config, spec, tokens)])
    if spec.device_type == "cpu":
        most = int(CPU_CACHE_GB * GB) // block
        step, largest = min(step, most), min(largest, most)
    states = _state_bytes(config, spec)
    return CacheSizes(
        step=step * block + states,
        largest=largest * block + states,
        least=min(longest, step) * block + states,
        block=block,
    )


def _state_bytes(config: Config, spec: RoleSpec) -> int:
    """Count the bytes of recurrent layers' states, for the samples of any call of the run."""
    most = config.rollout.max_running
    samples = most if held_out_sets(config) else samples_per_replica(config, spec)
    return StateShape(
        layers=recurrent_layers(spec.model),
        num_slots=slots_needed(samples, most),
        tp_size=spec.placement.degrees["tp"],
        dtype=spec.dtype,
        device=spec.device,
    ).num_bytes


def block_tokens(config: Config, spec: RoleSpec) -> int:
    """Tokens of a block of the cache."""
    multiple = BLOCK_MULTIPLE if reads_pages(spec) else 1
    return -(-config.rollout.block_size // multiple) * multiple


def reads_pages(spec: RoleSpec) -> bool:
    """Whether attention of the engine reads the cache's pages as they are."""
    # a host without a GPU plans for GPUs that torch's kernels support
    capability = None if torch.cuda.is_available() else LEAST_CAPABILITY
    # layers of a kind share their mixer, or are few
    mixers = {id(layer.mixer): layer.mixer for layer in spec.model.layers}.values()
    layers = [layer_cache(mixer, spec.placement.degrees["tp"]) for mixer in mixers]
    return pages_are_usable(layers, spec.dtype, spec.device, capability)


def _evaluation_blocks(config: Config, spec: RoleSpec, tokens: int) -> list[int]:
    """Blocks that the samples of each held-out set can need; those of unknown size are large."""
    if spec.is_judge:  # its questions count those of evaluations
        return []
    found, replicas = [], spec.placement.num_replicas
    longest = longest_prompt(config)
    for name, described in held_out_sets(config).items():
        if (described.kind or config.data_kind()) != "prompts":
            continue
        held_out = config.evaluation.held_out
        items = described.max_items
        if name == HELD_OUT and isinstance(held_out, int):
            items = held_out
        running = config.rollout.max_running
        if items is not None:
            running = min(running, -(-items * described.num_samples // replicas))
        prompt = longest if described.data is None else described.data.max_tokens
        length = min(prompt + set_response_tokens(config, described), spec.model.max_position)
        found.append(running * -(-length // tokens))
    return found


def shrunk(
    parts: Sequence[Part],
    calls: Sequence[PlannedCall],
    capacity: int | None,
    sizes: Mapping[PartKey, CacheSizes],
) -> list[Part]:
    """The parts, with caches as small as their calls need them to be to fit, as far as possible."""
    found = list(parts)
    for call in calls if capacity is not None else ():
        for i, part in enumerate(found):
            own = sizes.get(part.key)
            if own is None or own.is_given or part.key not in call.needs:
                continue
            assert capacity is not None
            others = least_peak(found, call, capacity) - part.num_bytes
            if others + part.num_bytes > capacity:
                room = max(capacity - others, 0) // own.block * own.block
                found[i] = replace(part, num_bytes=max(own.least, min(part.num_bytes, room)))
    return found


def grown(plan: MemoryPlan, sizes: Mapping[PartKey, CacheSizes]) -> list[Part]:
    """The plan's parts, with caches as large as evaluations can use while every call still fits."""
    found = list(plan.parts)
    for i, part in enumerate(found):
        own = sizes.get(part.key)
        calls = [call for call in plan.calls if part.key in call.resident]
        if own is None or part.num_bytes >= own.largest or plan.capacity is None or not calls:
            continue
        room = plan.capacity - max(call.peak_bytes for call in calls)
        most = (part.num_bytes + max(room, 0)) // own.block * own.block
        found[i] = replace(part, num_bytes=max(part.num_bytes, min(own.largest, most)))
    return found
