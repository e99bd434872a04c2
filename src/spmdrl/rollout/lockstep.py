"""`Lockstep`: the ranks that run every step of an engine together.

These are the ranks of a tensor-parallel group, which have the same samples. Where replicas share
their experts, their groups take as many steps as the one with the most work: in each step all
exchange tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.parallel import Parallel
from spmdrl.memory.host_copies import to_device


class Posted:
    """A message on its way from the leader."""

    def __init__(self, values: Sequence[int] | Tensor, work: dist.Work | None = None) -> None:
        self._values, self._work = values, work

    def receive(self) -> list[int]:
        """Return the leader's values."""
        if self._work is not None:
            self._work.wait()
        if isinstance(self._values, Tensor):
            found: list[int] = self._values.tolist()
            return found
        return list(self._values)


class Lockstep:
    """A group whose first rank, the leader, decides for all. A group of one sends no messages.

    Args:
        tp: this rank's place in the group.
        exchange: the ranks of other replicas that hold other experts, if there are any.
    """

    def __init__(
        self, tp: Parallel, device: torch.device, exchange: dist.ProcessGroup | None = None
    ) -> None:
        self._tp, self._device, self._exchange = tp, device, exchange

    @property
    def shares_experts(self) -> bool:
        """Whether replicas step together, with or without work of their own."""
        return self._exchange is not None

    def has_step(self, has_work: bool, stop: bool) -> bool:
        """Whether the group takes another step: some replica has work, and none is to stop.

        Args:
            has_work, stop: of this replica, equal on its ranks.
        """
        if self._exchange is None:
            return has_work and not stop
        message = torch.tensor([int(has_work), int(stop)], device=self._device)
        dist.all_reduce(message, dist.ReduceOp.MAX, group=self._exchange)
        some_work, some_stop = message.tolist()
        return bool(some_work) and not some_stop

    @property
    def is_alone(self) -> bool:
        """Whether the group is of one rank."""
        return self._tp.group is None

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

    def post(self, values: Sequence[int]) -> Posted:
        """Begin a message of the leader's values, between hosts; every rank posts equally many, and
        must receive what it has posted.
        """
        if self._tp.group is None:
            return Posted(values)
        message = torch.tensor(values)
        leader = dist.get_global_rank(self._tp.group, 0)
        return Posted(message, dist.broadcast(message, leader, group=self._tp.group, async_op=True))

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' values."""
        if self._tp.group is None:
            return value
        message = torch.tensor(value, device=self._device)
        dist.all_reduce(message, dist.ReduceOp.MIN, group=self._tp.group)
        return int(message)
