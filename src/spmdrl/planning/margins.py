"""Device memory that no part and no working memory counts: what CUDA, NCCL and fragments take.

It depends on the run: one GPU has no communicator, a rank of five roles on 64 nodes a dozen. A flat
share of the device would waste gigabytes on the one and be too little on the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from spmdrl.distributed.mesh import AXES, EXPERT_AXES, expert_degrees, expert_place
from spmdrl.placement import Placement
from spmdrl.role_spec import RoleSpec
from spmdrl.weights.plan import SyncPlan

MIB = 2**20

CONTEXT_BYTES = 600 * MIB
"""CUDA's context with lazily loaded kernels (300 MB and more,
https://github.com/pytorch/pytorch/issues/107667), and what the driver keeps of the total that
`nvidia-smi` prints. A run measures what is free without it; plans for absent devices subtract it.
"""

WORKSPACE_BYTES = 160 * MIB
"""Workspaces of cuBLAS (32 MiB for each stream with products, on Hopper) and the mover's bucket."""

CHANNELS = 24
"""NCCL's channels within a node with NVLink (8 H100, https://github.com/NVIDIA/nccl/issues/1367)."""

RING_BYTES = CHANNELS * 2 * 12 * MIB
"""Buffers of a communicator for its rings and trees: 10 MiB to receive and 2 MiB to send for each
channel (the allocations in https://github.com/NVIDIA/nccl/issues/1685, where a device of 8 H100
had 1.06 GB in use after a communicator's start, its context included). They do not grow with the
number of nodes (https://github.com/NVIDIA/nccl/issues/864)."""

PEER_BYTES = 14 * MIB
"""Buffers of one channel to one peer of a node, for messages between two ranks: 32 channels to 7
peers took 3.28 GB (https://github.com/NVIDIA/nccl/issues/1685)."""

PEER_CHANNELS, PEER_CHANNELS_OF_NODES = 32, 2
"""Channels to each peer if all ranks are on one node, and if not ("2 p2p channels per peer",
https://github.com/NVIDIA/nccl/issues/1189)."""

NETWORK_BYTES = 512 * MIB
"""Shared buffer of a communicator for messages over the network
(https://github.com/NVIDIA/nccl/issues/2363)."""

FRAGMENT_SHARE = 0.03
"""Share of the device that fragments: with segments that grow, what is lost is the rest of 2 MiB
pages and of blocks that wait for an event; vLLM's sleep needs segments of fixed size."""

FIXED_FRAGMENT_SHARE = 0.06


@dataclass(frozen=True, kw_only=True)
class Communicator:
    """A NCCL communicator of a rank.

    Args:
        use: the axes or the sync that it serves, by role.
        size: its number of ranks.
        num_bytes: its buffers on the device.
    """

    use: str
    size: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Margin:
    """Memory of a device that roles may not fill.

    Args:
        communicators: those of the rank that has most.
        workspace_bytes: workspaces of libraries.
        fragment_share: share of the device that may be lost to fragments.
    """

    communicators: tuple[Communicator, ...]
    workspace_bytes: int
    fragment_share: float

    @property
    def nccl_bytes(self) -> int:
        return sum(own.num_bytes for own in self.communicators)

    def fragment_bytes(self, free_bytes: int) -> int:
        return int(free_bytes * self.fragment_share)

    def room(self, free_bytes: int) -> int:
        """Bytes of so much free memory that parts and working memory may fill."""
        taken = self.nccl_bytes + self.workspace_bytes + self.fragment_bytes(free_bytes)
        return max(0, free_bytes - taken)


def margin_of(
    specs: Mapping[str, RoleSpec],
    placements: Mapping[str, Placement],
    syncs: Mapping[str, SyncPlan],
    node_size: int,
    world_size: int,
) -> Margin:
    """Margin of the rank with most communicators; ranks with the same roles have equally many.

    Args:
        placements: those of all roles on devices.
    """
    roles: dict[int, list[str]] = {}
    for name, placement in placements.items():
        for rank in placement.ranks:
            roles.setdefault(rank, []).append(name)
    rollouts = [name for name, spec in specs.items() if spec.has_engine]
    first = {tuple(names): rank for rank, names in reversed(roles.items())}
    found = [
        communicators_on(
            rank, {n: placements[n] for n in names}, rollouts, syncs, node_size, world_size
        )
        for names, rank in first.items()
    ]
    fixed = any(spec.is_vllm for spec in specs.values())
    return Margin(
        communicators=max(found, key=_bytes_of, default=()),
        workspace_bytes=WORKSPACE_BYTES,
        fragment_share=FIXED_FRAGMENT_SHARE if fixed else FRAGMENT_SHARE,
    )


def communicators_on(
    rank: int,
    placements: Mapping[str, Placement],
    rollouts: Collection[str],
    syncs: Mapping[str, SyncPlan],
    node_size: int,
    world_size: int,
) -> tuple[Communicator, ...]:
    """Communicators of a rank that carry collectives; roles share those over the same ranks.

    Args:
        placements: those of the rank's roles.
        rollouts: roles that only generate: their replicas are independent.
    """
    if world_size == 1:
        return ()
    uses: dict[tuple[int, ...], list[str]] = {tuple(range(world_size)): ["world"]}
    exchanges: set[tuple[int, ...]] = set()
    for name, placement in placements.items():
        axes = _USED_BY_ROLLOUTS if name in rollouts else _USED
        for axis, ranks, exchanged in _groups_on(rank, placement, axes):
            uses.setdefault(ranks, []).append(f"{name} {axis}")
            if exchanged:
                exchanges.add(ranks)
    for name, sync in syncs.items():
        if sync.gathered_bytes:
            exchanges.add(tuple(range(world_size)))
        for ranks in sync.groups:
            if rank in ranks:
                uses.setdefault(ranks, []).append(f"{name} sync")
    return tuple(
        Communicator(
            use=", ".join(dict.fromkeys(own)),
            size=len(ranks),
            num_bytes=RING_BYTES + (_peer_bytes(rank, ranks, node_size) * (ranks in exchanges)),
        )
        for ranks, own in uses.items()
    )


def _bytes_of(communicators: Iterable[Communicator]) -> int:
    return sum(own.num_bytes for own in communicators)


def _peer_bytes(rank: int, ranks: tuple[int, ...], node_size: int) -> int:
    """Buffers for messages between two ranks, to all that a rank may send to."""
    near = sum(other // node_size == rank // node_size for other in ranks) - 1
    if near == len(ranks) - 1:
        return near * PEER_CHANNELS * PEER_BYTES
    return near * PEER_CHANNELS_OF_NODES * PEER_BYTES + NETWORK_BYTES


_USED: Mapping[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "tp": ("tp",),
    "cp": ("cp",),
    "dp_replicate": ("dp_replicate",),
    "shard": ("dp_shard", "cp"),
    "reduce": ("dp_replicate", "dp_shard", "cp"),
    "all": AXES,
}
"""Axes whose groups carry collectives on the device."""

_USED_BY_ROLLOUTS: Mapping[str, tuple[str, ...]] = {"tp": ("tp",), "replica": ("cp", "tp")}

_USED_BY_EXPERTS: Mapping[str, tuple[str, ...]] = {
    "exchange": ("exchange",),
    "edp": ("edp",),
    "etp": ("etp",),
}


def _groups_on(
    rank: int, placement: Placement, used: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Groups of a rank along a role's axes: axis, ranks, and whether rows are exchanged in it."""
    index = placement.ranks.index(rank)
    sizes = {axis: placement.degrees[axis] for axis in AXES}
    place = _place(index, sizes)
    for name, axes in used.items():
        if math.prod(sizes[axis] for axis in axes) > 1:
            yield name, _group(placement.ranks, sizes, place, axes), False
    if placement.degrees["ep"] > 1:
        experts = expert_degrees(placement.degrees)
        own = expert_place(placement.degrees, place)
        own = {axis: own[axis] for axis in EXPERT_AXES}
        for name, axes in _USED_BY_EXPERTS.items():
            if math.prod(experts[axis] for axis in axes) > 1:
                group = _group(placement.ranks, experts, own, axes)
                yield name, group, name == "exchange"


def _place(index: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Index along each axis, the last axis fastest."""
    place = {}
    for axis in reversed(list(sizes)):
        index, place[axis] = divmod(index, sizes[axis])
    return {axis: place[axis] for axis in sizes}


def _group(
    ranks: tuple[int, ...],
    sizes: Mapping[str, int],
    place: Mapping[str, int],
    axes: tuple[str, ...],
) -> tuple[int, ...]:
    """Ranks that differ from a place along `axes` only."""
    offsets = [0]
    stride = 1
    for axis in reversed(list(sizes)):
        steps = range(sizes[axis]) if axis in axes else [place[axis]]
        offsets = [step * stride + offset for step in steps for offset in offsets]
        stride *= sizes[axis]
    return tuple(ranks[offset] for offset in offsets)
