"""Bytes of ZeRO's stages on a rank, by what DeepSpeed allocates for each.

The sizes follow deepspeed's `runtime/zero/stage_1_and_2.py`, `stage3.py` and
`runtime/bf16_optimizer.py` (ZeRO 1 in bfloat16). P is the number of values that the rank updates, T
that of all it computes with and trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spmdrl.models.local_shards import Table, counted
from spmdrl.models.zero_layout import num_shards_of
from spmdrl.planning.systems.train_memory import TrainMemory, UnitSizes, trained_bytes, unit_sizes
from spmdrl.role_spec import RoleSpec

_WIDE = 4
"""Bytes of a float32 value: masters, moments, sums of gradients and what is sent of these."""

_LIVE, _PREFETCHED = 10**9, 5 * 10**7
"""DeepSpeed's defaults of `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`."""

_OFFLOADED: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "optimizer": frozenset({"optimizer"}),
    "all": frozenset({"optimizer", "weights", "base"}),
}


def zero_memory(
    spec: RoleSpec,
    weights: Table,
    states: Table,
    settings: Callable[[int], Mapping[str, Any]],
) -> TrainMemory:
    """Return the memory of a role on a rank.

    Args:
        weights, states: its tables of weights, and of masters.
        settings: makes the engine's settings from the number of values that are trained.
    """
    stage, degrees = spec.train.deepspeed.stage, spec.placement.degrees
    offloads = _OFFLOADED[spec.train.deepspeed.offload]
    updated = trained_bytes(states) // _WIDE if spec.trained else 0
    computed = trained_bytes(weights) // _WIDE if spec.trained else 0
    if stage == 3:
        computed = updated * num_shards_of(degrees)
    zero = settings(max(1, computed))["zero_optimization"]
    units = unit_sizes(spec.model, spec.head, degrees["tp"], degrees.get("ep", 1))
    live = 0
    if stage == 3:
        live = _live(zero, _numel(weights) * num_shards_of(degrees)) * spec.dtype.itemsize
    if not spec.trained:
        return TrainMemory(optimizer=0, gradients=0, reads=live, passes=live, offloads=offloads)
    bucket = int(zero["reduce_bucket_size"])
    on_host = "optimizer" in offloads
    return TrainMemory(
        optimizer=3 * _WIDE * updated,  # masters and two moments, also of float32 weights
        gradients=_gradients(spec, updated, computed, on_host=on_host),
        reads=live,
        passes=live + _buffers(spec, bucket, computed, units, on_host=on_host),
        offloads=offloads,
        host=_host(spec, updated, units) if on_host else 0,
    )


def _numel(table: Table) -> int:
    return sum(math.prod(held.shape) * count for held, count in counted(table))


def _live(zero: Mapping[str, Any], numel: int) -> int:
    """Values of weights that are gathered at once under ZeRO 3."""
    live = int(zero.get("stage3_max_live_parameters", _LIVE))
    return min(live + int(zero.get("stage3_prefetch_bucket_size", _PREFETCHED)), numel)


def _gradients(spec: RoleSpec, updated: int, computed: int, *, on_host: bool) -> int:
    """Sums of gradients on the device: T with ZeRO 1, and P with copies of it for the step."""
    stage, is_wide = spec.train.deepspeed.stage, spec.dtype is torch.float32
    if stage == 1:
        # the ZeRO 1 of bfloat16 updates from views of the whole sum
        copies = 0 if not is_wide and not on_host else 2 * updated
        return _WIDE * (computed + (0 if on_host else copies))
    if on_host:
        return 0
    if stage == 2:
        return _WIDE * updated * (2 if is_wide else 1)
    return _WIDE * 2 * updated


def _buffers(spec: RoleSpec, bucket: int, computed: int, units: UnitSizes, *, on_host: bool) -> int:
    """Gradients on their way to those sums: buckets, and copies in the dtype that is sent."""
    size, is_wide = spec.dtype.itemsize, spec.dtype is torch.float32
    found = bucket * (size if is_wide else size + _WIDE)
    if spec.train.deepspeed.stage == 1:
        # the pass's own gradients are added to the sums at its end
        found = _WIDE * bucket if is_wide else size * computed
    if spec.train.deepspeed.stage == 3:
        found = _WIDE * bucket + units.largest * (size + _WIDE)
    return found + (units.largest * size if on_host else 0)


def _host(spec: RoleSpec, updated: int, units: UnitSizes) -> int:
    """Bytes of the host in addition to masters and moments: gradients, their sums over passes, and
    the weights on their way back.
    """
    return updated * (2 * _WIDE + spec.dtype.itemsize) + units.largest * spec.dtype.itemsize
