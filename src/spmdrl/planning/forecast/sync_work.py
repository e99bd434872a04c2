"""Work of the weight syncs, from their plans: bytes that a rank sends or receives, by way."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from spmdrl.planning.forecast.work import Link, Work
from spmdrl.weights.plan import SyncPlan
from spmdrl.weights.routes import Ranks

_ROUND_LAUNCHES = 12
"""Kernels and calls of a round: packing, messages, unpacking."""


def sync_work(plan: SyncPlan, node_size: int) -> Work:
    """Work of a sync after the first, of a rank that has the most of each kind.

    Args:
        node_size: ranks of a node.
    """
    if not plan.moves:
        return Work()
    traffic = _Traffic(plan, node_size)
    sent, received, copied = traffic.sent, traffic.received, traffic.copied
    most: dict[Link, float] = {
        "node": _most(sent["node"], received["node"]),
        "network": _most(sent["network"], received["network"]),
    }
    staged = copied + sum(received.values()) + sum(sent.values())
    far: Link = "network" if most["network"] > 0 else "node"
    moves = bool(most["node"] or most["network"])
    rounds = len(plan.rounds)
    return Work(
        memory_bytes=2 * float(staged.max()),
        link_bytes={link: size for link, size in most.items() if size > 0},
        messages={far: float(rounds)} if moves else {},
        launches=_ROUND_LAUNCHES * rounds,
    )


def _bytes_by_route(plan: SyncPlan) -> Counter[int]:
    """Bytes that each route delivers in a sync after the first."""
    ranges: Counter[tuple[int, int, int]] = Counter(
        (cells.pattern, cells.first, cells.last) for one in plan.rounds for cells in one
    )
    found: Counter[int] = Counter()
    for (pattern, first, last), count in ranges.items():
        for cell, route in plan.patterns[pattern][first:last]:
            found[route] += cell.num_bytes * count
    return found


class _Traffic:
    """Bytes that every rank sends, receives and copies, by way."""

    def __init__(self, plan: SyncPlan, node_size: int) -> None:
        self._node_size = node_size
        zeros = torch.zeros(plan.world_size, dtype=torch.float64)
        self.copied = zeros.clone()
        self.sent = {link: zeros.clone() for link in ("node", "network")}
        self.received = {link: zeros.clone() for link in ("node", "network")}
        copies: Counter[Ranks] = Counter()
        sends: Counter[tuple[int, int]] = Counter()
        casts: Counter[Ranks] = Counter()
        roots: Counter[tuple[int, Ranks]] = Counter()
        for number, num_bytes in _bytes_by_route(plan).items():
            route = plan.routes[number]
            copies[route.copies] += num_bytes
            for pair in route.sends:
                sends[pair] += num_bytes
            for root, group in route.casts:
                casts[group] += num_bytes
                roots[root, group] += num_bytes
        for ranks, num_bytes in copies.items():
            self.copied[list(ranks)] += num_bytes
        self._add_sends(sends)
        for group, num_bytes in casts.items():
            for link, size in self._along_ring(group, num_bytes):
                self.sent[link][list(group)] += size
                self.received[link][list(group)] += size
        for (root, group), num_bytes in roots.items():
            for link, size in self._along_ring(group, num_bytes):
                self.received[link][root] -= size

    def _add_sends(self, sends: Counter[tuple[int, int]]) -> None:
        if not sends:
            return
        ends = torch.tensor(list(sends))
        sizes = torch.tensor(list(sends.values()), dtype=torch.float64)
        nodes = ends // self._node_size
        near = nodes[:, 0] == nodes[:, 1]
        for link, chosen in (("node", near), ("network", ~near)):
            self.sent[link].index_add_(0, ends[chosen, 0], sizes[chosen])
            self.received[link].index_add_(0, ends[chosen, 1], sizes[chosen])

    def _along_ring(self, group: Ranks, num_bytes: float) -> tuple[tuple[str, float], ...]:
        """Bytes of each rank: a ring passes each on once, and its ranks on a node share what
        enters that.
        """
        count = len({rank // self._node_size for rank in group})
        far = num_bytes * count / len(group) if count > 1 else 0.0
        return ("network", far), ("node", num_bytes - far)


def _most(sent: Tensor, received: Tensor) -> float:
    return float(torch.maximum(sent, received).max())
