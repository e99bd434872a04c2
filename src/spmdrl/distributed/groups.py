"""`ProcessGroups`: one process group for each set of ranks, shared by all that need it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist


class ProcessGroups:
    """The process groups of a run, by their ranks and backend, made when they are first asked for.

    A NCCL communicator takes seconds to connect and up to some hundred MB of each device. Meshes of
    roles on the same ranks and weight syncs therefore share groups. They may: every rank has one
    order of role calls and of the collectives in them, so uses of a group never cross.

    Every rank of the world asks for the same groups in the same order, whether it is in them or
    not: they are made collectively.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], str | None], dist.ProcessGroup] = {}

    def over(self, ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
        """Return the group of these world ranks; a placeholder on ranks outside.

        Args:
            ranks: ascending.
            backend: None for the world's backend, in which the world's own group serves all ranks.
        """
        key = (tuple(ranks), backend)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def __len__(self) -> int:
        return len(self._made)

    def _make(self, ranks: tuple[int, ...], backend: str | None) -> dist.ProcessGroup:
        if backend is None and ranks == tuple(range(dist.get_world_size())):
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        group: dist.ProcessGroup = dist.new_group(list(ranks), backend=backend)
        return group
