"""Reductions and gathers of values that all ranks of the world must agree on, on host tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.config.user_objects import AgreedError

Result = TypeVar("Result")

_MOST_ROWS = 1 << 40
"""Largest plausible number of rows of a rank's table: more means a different collective."""


def gather_tables(table: Tensor) -> list[Tensor]:  # table [n, k], n differs between ranks
    """Every rank's table, in rank order, on every rank. `k` and the dtype must be equal.

    Raises:
        RuntimeError: other ranks are in another collective, as far as this can be detected.
    """
    rows, counts = gather_table(table)
    return list(torch.split(rows, counts.tolist()))


def gather_table(table: Tensor) -> tuple[Tensor, Tensor]:  # table [n, k], n differs between ranks
    """All ranks' rows in rank order, and the number of each rank's: `[N, k]`, int64 `[ranks]`.

    Raises:
        RuntimeError: see `gather_tables`.
    """
    size = dist.get_world_size()
    if size == 1:
        return table, torch.tensor([len(table)])
    counts = torch.zeros(size, dtype=torch.int64)
    counts[dist.get_rank()] = table.shape[0]
    dist.all_reduce(counts)
    least, most = int(counts.min()), int(counts.max())
    if counts[dist.get_rank()] != table.shape[0] or least < 0 or most > _MOST_ROWS:
        raise RuntimeError(
            "ranks are in different collectives: what reduces over the world (moments, world_sum, "
            "environment.metrics(), role calls) must be called by every rank, in the same order"
        )
    if most == 0:
        return table, counts
    padded = table.new_zeros(most, *table.shape[1:])
    padded[: table.shape[0]] = table
    gathered = table.new_empty(size * most, *table.shape[1:])
    # torch 2.13 renamed it, and warns of the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, padded)
    if least == most:
        return gathered, counts
    is_row = torch.arange(most) < counts[:, None]
    return gathered[is_row.flatten()], counts


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank; meant for small reports."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_at_first(value: Any) -> list[Any] | None:
    """Every rank's picklable value, in rank order, on rank 0; None on the others."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def broadcast_object(value: Any, source: int) -> Any:
    """`value` of rank `source` on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


class OtherRankFailed(dist.DistError):
    """Another rank raised an error that is not this rank's; treated like a lost peer."""


def agreed(kind: type[OSError] | type[ValueError], action: Callable[[], Result]) -> Result:
    """Run `action`; if it raises `kind` on one rank, every rank of the world raises it, naming that
    rank unless all of them say the same.

    Raises:
        AgreedError: for `ValueError`.
        OtherRankFailed: it raised another error on another rank, which ends with that error. No
            rank waits here for a rank that has failed.
    """
    result: list[Result] = []
    failure: tuple[bool, str] | None = None
    known: Exception | None = None
    own: Exception | None = None
    try:
        result.append(action())
    except kind as error:
        known, failure = error, (True, str(error))
    except Exception as error:
        own = error
        failure = False, f"{type(error).__name__}: {error}"
    found: list[tuple[bool, str] | None] = gather_objects(failure)
    if own is not None:
        raise own
    is_same = len(set(found)) == 1
    failures = [(*one, rank) for rank, one in enumerate(found) if one is not None]
    for is_known, text, rank in sorted(failures, key=lambda one: one[0]):
        text = text if is_same else f"rank {rank}: {text}"
        if not is_known:
            raise OtherRankFailed(text)
        raise (AgreedError if kind is ValueError else kind)(text) from known
    return result[0]


def world_sum(values: Tensor) -> Tensor:  # any shape, equal on all ranks
    """The sum over the world in float64, on the host."""
    total = values.detach().to("cpu", torch.float64).clone()
    dist.all_reduce(total)
    return total


def group_sums(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """The sum of each number over a group (only this rank if None), in float64, on the host."""
    total = torch.tensor(values, dtype=torch.float64)
    if group is not None:
        dist.all_reduce(total, group=group)
    sums: list[float] = total.tolist()
    return sums


def group_any(flag: bool, group: dist.ProcessGroup | None) -> bool:
    """True on every rank of a group (only this rank if None) if it is true on one."""
    if group is None:
        return flag
    most = torch.tensor([float(flag)])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return bool(most.item())


def world_max(values: Tensor) -> Tensor:
    """The maximum over the world in float64, on the host."""
    most = values.detach().to("cpu", torch.float64).clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most


def world_any(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    return bool(world_max(torch.tensor([float(flag)])).item())


def world_flags(*flags: bool) -> list[bool]:
    """The flags, each true on every rank if it is true on one."""
    return [value > 0 for value in world_max(torch.tensor([float(f) for f in flags])).tolist()]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean, (population) standard deviation and extremes over the world; all 0 if empty."""

    count: float
    mean: float
    std: float
    minimum: float
    maximum: float


def moments(column: Tensor, mask: Tensor | None = None) -> Moments:  # column [N], mask [N] bool
    """Moments of a column's values (those in `mask`) over all ranks, reduced in float64.

    The variance is computed in two passes, so a large mean costs no digits.
    """
    values = column.detach().to("cpu", torch.float64).flatten()
    if mask is not None:
        values = values[mask.to("cpu").flatten()]
    first = world_sum(torch.stack([torch.tensor(float(len(values))).double(), values.sum()]))
    count = first[0].item()
    if count == 0:
        return Moments(count=0.0, mean=0.0, std=0.0, minimum=0.0, maximum=0.0)
    mean = first[1].item() / count
    variance = world_sum(((values - mean) ** 2).sum()).item() / count
    infinite = torch.tensor([float("-inf")], dtype=torch.float64)
    extremes = world_max(
        torch.stack([torch.cat([infinite, -values]).max(), torch.cat([infinite, values]).max()])
    )
    return Moments(
        count=count,
        mean=mean,
        std=variance**0.5,
        minimum=-extremes[0].item(),
        maximum=extremes[1].item(),
    )
