"""One rank's part of a plan: messages and local copies, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spmdrl.weights.cells import Cell
from spmdrl.weights.plan import SyncPlan
from spmdrl.weights.rounds import Round
from spmdrl.weights.routes import Ranks, Route

LARGE_BYTES = 1 << 18
"""Cells of this size are sent on their own, without staging if dense in memory at both ends."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """Cells that travel together, widest dtype first (so each is aligned).

    Args:
        cells: (tensor's name, cell) each.
        peer: the other rank of a message, or the root of a broadcast.
        group: group of a broadcast; None for a message between two ranks.
        tag: distinguishes the messages between two ranks in a round.
    """

    peer: int
    group: Ranks | None
    tag: int
    cells: tuple[tuple[str, Cell], ...]

    @property
    def num_bytes(self) -> int:
        return sum(cell.num_bytes for _, cell in self.cells)


@dataclass(frozen=True, kw_only=True)
class RankRound:
    """A rank's part of a round: `copies` any time; `casts` after all `sends` and `receives`."""

    copies: tuple[tuple[str, Cell], ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    casts: tuple[Message, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.copies or self.sends or self.receives or self.casts)


def rank_rounds(plan: SyncPlan, rounds: Sequence[Round], rank: int) -> tuple[RankRound, ...]:
    """The part of `rank` in these rounds of the plan, one entry per round.

    Ranks that share a message list its cells alike: both follow the plan's order in a round.
    """
    own: dict[int, list[_RankRoute]] = {}
    numbers = {group: i for i, group in enumerate(plan.groups)}
    found = []
    for one in rounds:
        building = _Building()
        for cells in one:
            if cells.pattern not in own:
                own[cells.pattern] = [
                    _rank_route(i, cell, plan.routes[route], rank, numbers)
                    for i, (cell, route) in enumerate(plan.patterns[cells.pattern])
                    if rank in plan.routes[route].ranks
                ]
            for route in own[cells.pattern]:
                if cells.first <= route.index < cells.last:
                    building.add(cells.name, route)
        found.append(building.finish(plan.groups))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankRoute:
    """A rank's part in the route of a cell: made once, used for every tensor with the pattern."""

    index: int
    cell: Cell
    is_large: bool
    copies: bool
    receivers: tuple[int, ...]
    senders: tuple[int, ...]
    casts: tuple[tuple[int, int], ...]
    """(the group's number, root)"""


def _rank_route(
    index: int, cell: Cell, route: Route, rank: int, numbers: Mapping[Ranks, int]
) -> _RankRoute:
    return _RankRoute(
        index=index,
        cell=cell,
        is_large=cell.num_bytes >= LARGE_BYTES,
        copies=rank in route.copies,
        receivers=tuple(receiver for sender, receiver in route.sends if sender == rank),
        senders=tuple(sender for sender, receiver in route.sends if receiver == rank),
        casts=tuple((numbers[group], root) for root, group in route.casts if rank in group),
    )


@dataclass
class _Building:
    """A round of one rank under construction, cell by cell."""

    copies: list[tuple[str, Cell]] = field(default_factory=list)
    sends: dict[tuple[int, int], list[tuple[str, Cell]]] = field(default_factory=dict)
    receives: dict[tuple[int, int], list[tuple[str, Cell]]] = field(default_factory=dict)
    casts: dict[tuple[int, int, int], list[tuple[str, Cell]]] = field(default_factory=dict)
    num_cells: int = 0

    def add(self, name: str, route: _RankRoute) -> None:
        item = (name, route.cell)
        # 0: with the other small ones; else a number of its own, which only has to be in the
        # same order on all ranks of a message
        self.num_cells += 1
        number = self.num_cells if route.is_large else 0
        if route.copies:
            self.copies.append(item)
        for receiver in route.receivers:
            self.sends.setdefault((receiver, number), []).append(item)
        for sender in route.senders:
            self.receives.setdefault((sender, number), []).append(item)
        for group, root in route.casts:
            self.casts.setdefault((group, root, number), []).append(item)

    def finish(self, groups: Sequence[Ranks]) -> RankRound:
        # every rank goes through its groups in one order, so no two wait for each other
        casts = sorted(self.casts.items(), key=lambda cast: cast[0][0])
        return RankRound(
            copies=tuple(self.copies),
            sends=_messages(self.sends),
            receives=_messages(self.receives),
            casts=tuple(
                Message(peer=root, group=groups[group], tag=0, cells=_aligned(cells))
                for (group, root, _), cells in casts
            ),
        )


def _messages(by_peer: dict[tuple[int, int], list[tuple[str, Cell]]]) -> tuple[Message, ...]:
    tags: dict[int, int] = {}
    messages = []
    for (peer, _), cells in by_peer.items():
        tags[peer] = tags.get(peer, -1) + 1
        messages.append(Message(peer=peer, group=None, tag=tags[peer], cells=_aligned(cells)))
    return tuple(messages)


def _aligned(items: list[tuple[str, Cell]]) -> tuple[tuple[str, Cell], ...]:
    if len(items) == 1:  # the case of most messages
        return (items[0],)
    return tuple(sorted(items, key=lambda item: -item[1].dtype.itemsize))
