"""Work of one rank in a collective, by the places of its group's ranks on nodes.

Rings and trees follow NCCL: a ring enters and leaves a node once for every rank that the group has
there, so that these share the traffic between nodes; the bytes of an all-reduce are those of a
reduce-scatter and an all-gather (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spmdrl.placement import Placement
from spmdrl.planning.forecast.work import NOTHING, Link, Work

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of a role's mesh, the slowest first."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate.

    Args:
        size: number of ranks.
        nodes: number of nodes that they are on.
    """

    size: int
    nodes: int

    @property
    def per_node(self) -> float:
        return self.size / self.nodes


def group_along(
    placement: Placement, axes: Sequence[str], node_size: int, *, stride: int = 1, size: int = 0
) -> Group:
    """The group of a role's first rank along neighbouring axes.

    Args:
        axes: neighbours in `AXES`, in its order.
        stride: further steps between its ranks, in the last axis.
        size: its ranks; by default all along the axes.
    """
    inner = stride
    for axis in AXES[AXES.index(axes[-1]) + 1 :]:
        inner *= placement.degrees[axis]
    count = size or math.prod(placement.degrees[axis] for axis in axes)
    places = [min(i * inner, len(placement.ranks) - 1) for i in range(count)]
    return Group(size=count, nodes=len({placement.ranks[i] // node_size for i in places}))


def expert_group(placement: Placement, node_size: int) -> Group:
    """The ranks with other tokens that hold other experts."""
    degrees = placement.degrees
    outer = degrees["ep"] // math.gcd(degrees["tp"], degrees["ep"])
    return group_along(placement, ("cp",), node_size, size=outer)


def all_gather(group: Group, num_bytes: float) -> Work:
    """Gather `num_bytes` on every rank; a reduce-scatter of as many costs the same."""
    if group.size == 1:
        return NOTHING
    passed = num_bytes * (group.size - 1) / group.size
    steps = {"node": float(group.size - group.nodes), "network": float(group.nodes - 1)}
    return Work(link_bytes=_along_ring(group, passed), messages=_used(steps))


def all_reduce(group: Group, num_bytes: float) -> Work:
    """Sum `num_bytes` over the ranks: few steps, as of a tree."""
    if group.size == 1:
        return NOTHING
    passed = 2 * num_bytes * (group.size - 1) / group.size
    steps = {
        "node": 2.0 * math.ceil(math.log2(max(1.0, group.per_node))),
        "network": 2.0 * math.ceil(math.log2(group.nodes)),
    }
    return Work(link_bytes=_along_ring(group, passed), messages=_used(steps))


def all_to_all(group: Group, num_bytes: float) -> Work:
    """Send `num_bytes`, equally many to each rank of the group and one part to itself."""
    if group.size == 1:
        return NOTHING
    near = num_bytes * (group.per_node - 1) / group.size
    far = num_bytes * (group.size - group.per_node) / group.size
    steps = {
        "node": float(math.ceil(math.log2(max(1.0, group.per_node)))),
        "network": float(math.ceil(math.log2(group.nodes))),
    }
    return Work(link_bytes=_used({"node": near, "network": far}), messages=_used(steps))


def send(group: Group, num_bytes: float) -> Work:
    """Send to the next rank of the group, on another node if the group has several."""
    if group.size == 1:
        return NOTHING
    link: Link = "node" if group.nodes == 1 else "network"
    return Work(link_bytes={link: num_bytes}, messages={link: 1.0})


def _along_ring(group: Group, num_bytes: float) -> dict[Link, float]:
    if group.nodes == 1:
        return {"node": num_bytes}
    far = num_bytes / group.per_node
    return _used({"node": num_bytes - far, "network": far})


def _used(amounts: dict[str, float]) -> dict[Link, float]:
    links: tuple[Link, ...] = ("node", "network")
    return {link: amounts[link] for link in links if amounts[link] > 0}
