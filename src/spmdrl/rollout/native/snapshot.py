"""Snapshots: an aborted call of the engine as tensors, from which it resumes bit for bit.

Rounding depends on the rows that are computed together, so all of the scheduler's state is kept:
the running samples, their order and their blocks, and the contents of the used cache blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spmdrl.memory.json_tensors import json_tensor, tensor_json
from spmdrl.rollout.native.attention import PagedAttention
from spmdrl.rollout.native.recording import ExpertRecord
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.sampler import SupportRecord
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.protocol import Finish

_STATE, _KEYS, _VALUES, _EXPERTS = "engine", "keys", "values", "experts"


def take_snapshot(
    call: object,
    scheduler: Scheduler,
    samples: Sequence[Sample],
    attention: PagedAttention,
    record: ExpertRecord | None = None,
) -> dict[str, Tensor]:
    """Take a snapshot between two engine steps.

    Args:
        call: JSON values that distinguish this call on this engine from others.
        samples: all samples of the call, including complete ones.
    """
    number = {sample: i for i, sample in enumerate(samples)}
    held = scheduler.state(number)
    state = {
        "call": call,
        "num_blocks": scheduler.pool.num_blocks,
        "scheduler": held,
        "samples": [_sample_state(sample, number) for sample in samples],
        "first": None if record is None else number[record.first],
    }
    used = _used(held)
    keys, values = attention.caches()
    index = torch.tensor(used, dtype=torch.int64, device=keys[0].device)
    return {
        _STATE: json_tensor(state),
        _KEYS: torch.stack([layer.index_select(0, index) for layer in keys]).cpu(),
        _VALUES: torch.stack([layer.index_select(0, index) for layer in values]).cpu(),
        **({} if record is None else {_EXPERTS: record.table()}),
    }


def blocks_of(state: Mapping[str, Tensor] | None, call: object) -> int | None:
    """Return the size in blocks of a snapshot's cache; None if it is not one of `call`."""
    if not state:
        return None
    content = tensor_json(state[_STATE])
    # compared as JSON, which has no tuples
    same = content["call"] == tensor_json(json_tensor(call))
    return int(content["num_blocks"]) if same else None


def restore_snapshot(
    state: Mapping[str, Tensor],
    scheduler: Scheduler,
    samples: Sequence[Sample],
    attention: PagedAttention,
    record: ExpertRecord | None = None,
) -> None:
    """Restore fresh samples, a scheduler and a cache of the same call to the snapshot's state."""
    content = tensor_json(state[_STATE])
    for sample, found in zip(samples, content["samples"], strict=True):
        sample.tokens = [*sample.request.tokens, *found["tokens"]]
        sample.followers = [samples[i] for i in found["followers"]]
        sample.expert_rows, sample.finish = found["rows"], Finish[found["finish"].upper()]
        for name in ("logprobs", "margins", "blocks", "cached"):
            setattr(sample, name, found[name])
        sample.support = SupportRecord(
            counts=array("i", found["support"][0]), ids=array("i", found["support"][1])
        )
    scheduler.restore(content["scheduler"], samples)
    if record is not None:
        record.restore(state[_EXPERTS], samples[content["first"]])
    for layers, saved in zip(attention.caches(), (state[_KEYS], state[_VALUES]), strict=True):
        used = torch.tensor(_used(content["scheduler"]), dtype=torch.int64, device=layers[0].device)
        for layer, blocks in zip(layers, saved, strict=True):
            layer.zero_()
            layer.index_copy_(0, used, blocks.to(layer.device))


def _sample_state(sample: Sample, number: Mapping[Sample, int]) -> dict[str, Any]:
    return {
        "tokens": sample.tokens[sample.prompt_length :],
        "followers": [number[follower] for follower in sample.followers],
        "logprobs": sample.logprobs,
        "margins": sample.margins,
        "support": [list(sample.support.counts), list(sample.support.ids)],
        "finish": sample.finish.text,
        "blocks": sample.blocks,
        "cached": sample.cached,
        "rows": sample.expert_rows,
    }


def _used(scheduler: Mapping[str, Any]) -> list[int]:
    return [block for block, count in enumerate(scheduler["pool"]["references"]) if count]
