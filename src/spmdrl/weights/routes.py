"""Routes: delivery of a box of weights from the ranks that hold it to those that lack it.

Pure functions of sets of ranks. A box reaches every rank that lacks it exactly once: in a message,
or in a broadcast whose root holds the box or has just received it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

Ranks = tuple[int, ...]
"""Rank numbers, ascending."""

MAX_GROUPS = 8
"""Most broadcast groups that a rank takes part in; each costs a communicator and its buffers."""


@dataclass(frozen=True)
class Route:
    """Senders and receivers of a box.

    Args:
        copies: ranks that hold the box and want it in another tensor.
        sends: (from, to), which go first.
        casts: (root, group with the root), after the sends, one of which may have reached the root.
    """

    copies: Ranks
    sends: tuple[tuple[int, int], ...]
    casts: tuple[tuple[int, Ranks], ...]

    @cached_property
    def ranks(self) -> frozenset[int]:
        """All ranks that take part."""
        pairs = (rank for pair in self.sends for rank in pair)
        return frozenset((*self.copies, *pairs, *(r for _, group in self.casts for r in group)))

    @cached_property
    def num_receivers(self) -> int:
        return len(self.sends) + sum(len(group) - 1 for _, group in self.casts)


def find_route(
    holders: Ranks,
    wanting: Ranks,
    *,
    turn: int = 0,
    node_size: int = 1,
    allowed: Collection[Ranks] | None = None,
) -> Route:
    """The route of a box from `holders` to `wanting`.

    Holders that want the box themselves serve the others, each its own node or its block of
    `wanting`. If there are none, holders serve the ranks of their nodes, provided that every
    lacking rank has one there (or is the only one). Otherwise the box is sent once to one rank of
    `wanting`, which broadcasts it to the others.

    Args:
        turn: selects one of several equally good ranks; counted up from box to box, it spreads the
            load.
        node_size: ranks of a node.
        allowed: groups that may broadcast, or None for any; in place of other broadcasts, every
            rank gets a message of its own.
    """
    lacking, inside, near = _sides(holders, wanting, node_size)
    if not lacking:
        return Route(inside, (), ())
    if not (inside or near or len(lacking) == 1):
        entry = lacking[turn % len(lacking)]
        [(server, _)] = _nearest((entry,), holders, turn // len(lacking), node_size).items()
        if allowed is None or lacking in allowed:
            return Route(inside, ((server, entry),), ((entry, lacking),))
        # no communicator: every rank gets it from the holders
        others = [rank for rank in lacking if rank != entry]
        shares = _nearest(others, holders, turn, node_size)
        each = ((holder, rank) for holder, to in shares.items() for rank in to)
        return Route(inside, ((server, entry), *each), ())
    servers = inside or holders
    parts = _blocks(wanting, servers) or _nearest(lacking, servers, turn, node_size)
    sends: list[tuple[int, int]] = []
    casts: list[tuple[int, Ranks]] = []
    for server, part in parts.items():
        group = tuple(sorted((server, *part)))
        if len(part) > 1 and (allowed is None or group in allowed):
            casts.append((server, group))
        else:
            sends += [(server, rank) for rank in part]
    return Route(inside, tuple(sends), tuple(casts))


def choose_groups(bytes_by_group: Mapping[Ranks, int]) -> tuple[Ranks, ...]:
    """The groups worth a communicator: those with most bytes, at most `MAX_GROUPS` per rank."""
    taken: Counter[int] = Counter()
    chosen = []
    for group, _ in sorted(bytes_by_group.items(), key=lambda item: (-item[1], item[0])):
        if all(taken[rank] < MAX_GROUPS for rank in group):
            taken.update(group)
            chosen.append(group)
    return tuple(sorted(chosen))


@lru_cache(maxsize=1 << 14)
def _sides(holders: Ranks, wanting: Ranks, node_size: int) -> tuple[Ranks, Ranks, bool]:
    """Ranks of `wanting` without and with the box; whether the former all have a holder near."""
    held = set(holders)
    lacking, inside = wanting, tuple[int, ...]()
    if not held.isdisjoint(wanting):
        lacking = tuple([rank for rank in wanting if rank not in held])
        inside = tuple([rank for rank in wanting if rank in held])
    nodes = {rank // node_size for rank in holders}
    return lacking, inside, all(rank // node_size in nodes for rank in lacking)


@lru_cache(maxsize=1 << 14)
def _blocks(wanting: Ranks, servers: Ranks) -> dict[int, list[int]] | None:
    """Equal blocks of `wanting`, each with one server; None if the servers are not spread so.

    Boxes with other servers, one in each of the same blocks, then share their groups.
    """
    count, size = len(servers), len(wanting)
    blocks = [wanting[size * i // count : size * (i + 1) // count] for i in range(count)]
    found = {}
    inside = set(servers)
    for block in blocks:
        own = [rank for rank in block if rank in inside]
        if len(own) != 1:
            return None
        found[own[0]] = [rank for rank in block if rank != own[0]]
    return {server: part for server, part in found.items() if part}


def _nearest(
    lacking: Iterable[int], servers: Sequence[int], turn: int, node_size: int
) -> dict[int, list[int]]:
    """Assign each rank to a server on its node, or else to any, always to the least loaded one."""
    parts: dict[int, list[int]] = {}
    for rank in lacking:
        near = [s for s in servers if s // node_size == rank // node_size]
        among = near or servers
        start = turn % len(among)
        turned = [*among[start:], *among[:start]]
        parts.setdefault(min(turned, key=lambda s: len(parts.get(s, ()))), []).append(rank)
    return parts
