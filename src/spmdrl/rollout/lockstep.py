"""`Lockstep`: the ranks of a tensor-parallel group, which run every step of an engine together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from spmdrl.distributed.parallel import Parallel
from spmdrl.memory.host_copies import to_device


class Lockstep:
    """A group whose first rank, the leader, decides for all. A group of one sends no messages.

    Args:
        tp: this rank's place in the group.
    """

    def __init__(self, tp: Parallel, device: torch.device) -> None:
        self._tp, self._device = tp, device

    @property
    def is_leader(self) -> bool:
        return self._tp.rank == 0

    def from_leader(self, values: Sequence[int]) -> list[int]:
        """Return the leader's values, by one message; every rank passes equally many."""
        if self._tp.group is None:
            return list(values)
        [message] = to_device([torch.tensor(values)], self._device)
        dist.broadcast(message, dist.get_global_rank(self._tp.group, 0), group=self._tp.group)
        found: list[int] = message.tolist()
        return found

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        if self._tp.group is None:
            return value
        message = torch.tensor(value, device=self._device)
        dist.all_reduce(message, dist.ReduceOp.MIN, group=self._tp.group)
        return int(message)
