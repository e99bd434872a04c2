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
from spmdrl.rollout.native.recurrent import MixedAttention
from spmdrl.rollout.native.sample import Sample
from spmdrl.rollout.native.scheduler import Scheduler
from spmdrl.rollout.native.support import SupportRecord
from spmdrl.rollout.protocol import Ending, Finish

_STATE, _CACHE, _SLOTS, _EXPERTS = "engine", "cache", "slots", "experts"
_STACKED = ("keys", "values")
"""Names under which checkpoints of 0.2 and before hold the caches of all layers, stacked."""


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
    index = torch.tensor(_used(held), dtype=torch.int64)
    return {
        _STATE: json_tensor(state),
        **{
            f"{_CACHE}.{i}": cache.index_select(0, index.to(cache.device)).cpu()
            for i, cache in enumerate(attention.caches())
        },
        **_recurrent(attention, held),
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
        # checkpoints before 0.3 lack parts
        sample.set_generated(found["tokens"], found.get("parts", ()))
        sample.followers = [samples[i] for i in found["followers"]]
        sample.expert_rows, sample.finish = found["rows"], Finish[found["finish"].upper()]
        for name in ("logprobs", "margins", "blocks", "cached"):
            setattr(sample, name, found[name])
        # checkpoints of 0.2 and before lack these
        sample.slot, sample.turn_limit = found.get("slot"), found.get("turn_limit")
        sample.rewards = list(found.get("rewards", ()))
        ending = found.get("ending")
        sample.ending = None if ending is None else Ending(ending)
        sample.given = [(first, last) for first, last in found.get("given", ())]
        waits = found.get("waits")
        sample.waits = None if waits is None else Finish(waits)
        sample.support = SupportRecord(
            counts=array("i", found["support"][0]), ids=array("i", found["support"][1])
        )
    scheduler.restore(content["scheduler"], samples)
    if record is not None:
        record.restore(state[_EXPERTS], samples[content["first"]])
    used = torch.tensor(_used(content["scheduler"]), dtype=torch.int64)
    if _STACKED[0] in state:
        saved = [layer for name in _STACKED for layer in state[name]]
    else:
        saved = [state[f"{_CACHE}.{i}"] for i in range(len(attention.caches()))]
    for cache, blocks in zip(attention.caches(), saved, strict=True):
        cache.zero_()
        cache.index_copy_(0, used.to(cache.device), blocks.to(cache.device))
    if isinstance(attention, MixedAttention):
        held = torch.tensor(_used(content["scheduler"], "slots"), dtype=torch.int64)
        for i, tensor in enumerate(attention.states.caches()):
            saved_slots = state[f"{_SLOTS}.{i}"].to(tensor.device)
            tensor.index_copy_(0, held.to(tensor.device), saved_slots)


def _recurrent(attention: PagedAttention, scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy the used slots of recurrent layers to the host."""
    if not isinstance(attention, MixedAttention):
        return {}
    used = torch.tensor(_used(scheduler, "slots"), dtype=torch.int64)
    return {
        f"{_SLOTS}.{i}": tensor.index_select(0, used.to(tensor.device)).cpu()
        for i, tensor in enumerate(attention.states.caches())
    }


def _sample_state(sample: Sample, number: Mapping[Sample, int]) -> dict[str, Any]:
    return {
        "tokens": sample.generated,
        "parts": sample.parts,
        "followers": [number[follower] for follower in sample.followers],
        "logprobs": sample.logprobs,
        "margins": sample.margins,
        "support": [list(sample.support.counts), list(sample.support.ids)],
        "finish": sample.finish.text,
        "blocks": sample.blocks,
        "slot": sample.slot,
        "cached": sample.cached,
        "rows": sample.expert_rows,
        "given": sample.given,
        "turn_limit": sample.turn_limit,
        "rewards": sample.rewards,
        "ending": sample.ending,
        "waits": sample.waits,
    }


def _used(scheduler: Mapping[str, Any], pool: str = "pool") -> list[int]:
    return [number for number, count in enumerate(scheduler[pool]["references"]) if count]
