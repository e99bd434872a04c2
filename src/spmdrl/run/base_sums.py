"""Checksums of the models under adapters: a checkpoint holds adapters only, and names their bases.

A checksum reads four rows of every tensor, with all names, shapes and dtypes. Training a model
further changes every tensor, and conversions change dtypes or names, so another base is noticed;
reading all of it would cost minutes for a large model, at every start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from spmdrl.distributed.reduce import agreed, broadcast_object
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.sharding import SCORE
from spmdrl.models.tensors import Slice
from spmdrl.run.assembled import Base

BASES = "bases"
"""Key of a checkpoint's state."""

_ROWS = 4

BaseSums = dict[str, dict[str, str]]
"""Role -> `path` and `xxh3` of the model under its adapter."""


def base_sums(bases: Mapping[str, Base]) -> BaseSums:
    """Describe the models under adapters, as the first rank reads them. Every rank calls it.

    Raises:
        ValueError: a file cannot be read, on every rank.
    """

    def find() -> BaseSums:
        by_path: dict[Path, str] = {}
        found: BaseSums = {}
        for name, base in bases.items() if dist.get_rank() == 0 else ():
            path = base.path.resolve()
            if path not in by_path:
                by_path[path] = checksum(base.weights)
            found[name] = {"path": str(path), "xxh3": by_path[path]}
        return found

    found: BaseSums = broadcast_object(agreed(ValueError, find), 0)
    return found


def checksum(weights: TensorSource) -> str:
    """Return the 64-bit XXH3 of a model's names, shapes, dtypes and four rows of every tensor.

    A scalar head is left out: it trains, so a checkpoint holds it.
    """
    found = xxhash.xxh3_64()
    for name in sorted(weights.names - {SCORE}):
        shape = weights.shape(name)
        count = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
        rows = sorted({number * (count - 1) // (_ROWS - 1) for number in range(_ROWS)})
        for row in rows:
            values = weights.read(_row(name, shape, row))
            if row == 0:
                found.update(f"{name} {shape} {values.dtype}".encode())
            found.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _row(name: str, shape: Sequence[int], row: int) -> Slice:
    """Return row `row` of a tensor, counted over all dims but the last."""
    start, stop = [0] * len(shape), list(shape)
    for dim in reversed(range(max(1, len(shape) - 1))):
        row, start[dim] = divmod(row, shape[dim])
        stop[dim] = start[dim] + 1
    return Slice(name=name, shape=tuple(shape), start=tuple(start), stop=tuple(stop), offset=0)


def check_bases(saved: Mapping[str, Any], now: BaseSums, where: str) -> None:
    """Compare the bases that a checkpoint names with those of the configuration.

    Raises:
        ValueError: the adapter of a role was trained over another model.
    """
    for name in now.keys() & saved.keys():
        if saved[name]["xxh3"] != now[name]["xxh3"]:
            raise ValueError(
                f"roles.{name}: {where} holds an adapter of {saved[name]['path']} (checksum "
                f"{saved[name]['xxh3']}), and {now[name]['path']} holds other weights (checksum "
                f"{now[name]['xxh3']}): give the role that model, or choose another run_dir"
            )
