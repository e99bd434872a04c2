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

Item = tuple[str, Cell]
"""A tensor's name and a cell of it."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """Cells that travel together, widest dtype first (so each is aligned).

    Args:
        peer: the other rank of a message, or the root of a broadcast.
        group: group of a broadcast; None for a message between two ranks.
        tag: distinguishes the messages between two ranks in a round.
    """

    peer: int
    group: Ranks | None
    tag: int
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> int:
        return sum(cell.num_bytes for _, cell in self.items)


@dataclass(frozen=True, kw_only=True)
class RankRound:
    """A rank's part of a round: `copies` any time; `casts` after all `sends` and `receives`."""

    copies: tuple[Item, ...]
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    casts: tuple[Message, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.copies or self.sends or self.receives or self.casts)


def program_of(plan: SyncPlan, rounds: Sequence[Round], rank: int) -> tuple[RankRound, ...]:
    """The part of `rank` in these rounds of the plan, one entry per round.

    Ranks that share a message list its cells alike: both follow the plan's order in a round.
    """
    own: dict[int, list[_Part]] = {}
    numbers = {group: i for i, group in enumerate(plan.groups)}
    program = []
    for one in rounds:
        building = _Building()
        for span in one:
            if span.pattern not in own:
                own[span.pattern] = [
                    _part(i, cell, plan.routes[route], rank, numbers)
                    for i, (cell, route) in enumerate(plan.patterns[span.pattern])
                    if rank in plan.routes[route].ranks
                ]
            for part in own[span.pattern]:
                if span.first <= part.index < span.last:
                    building.add(span.name, part)
        program.append(building.finish(plan.groups))
    return tuple(program)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A rank's part in one cell of a pattern: made once, used for every tensor that has it."""

    index: int
    cell: Cell
    is_large: bool
    copies: bool
    receivers: tuple[int, ...]
    senders: tuple[int, ...]
    casts: tuple[tuple[int, int], ...]
    """(the group's number, root)"""


def _part(index: int, cell: Cell, route: Route, rank: int, numbers: Mapping[Ranks, int]) -> _Part:
    return _Part(
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

    copies: list[Item] = field(default_factory=list)
    sends: dict[tuple[int, int], list[Item]] = field(default_factory=dict)
    receives: dict[tuple[int, int], list[Item]] = field(default_factory=dict)
    casts: dict[tuple[int, int, int], list[Item]] = field(default_factory=dict)
    num_cells: int = 0

    def add(self, name: str, part: _Part) -> None:
        item = (name, part.cell)
        # 0: with the other small ones; else a number of its own, which only has to be in the
        # same order on all ranks of a message
        self.num_cells += 1
        number = self.num_cells if part.is_large else 0
        if part.copies:
            self.copies.append(item)
        for receiver in part.receivers:
            self.sends.setdefault((receiver, number), []).append(item)
        for sender in part.senders:
            self.receives.setdefault((sender, number), []).append(item)
        for group, root in part.casts:
            self.casts.setdefault((group, root, number), []).append(item)

    def finish(self, groups: Sequence[Ranks]) -> RankRound:
        # every rank goes through its groups in one order, so no two wait for each other
        casts = sorted(self.casts.items(), key=lambda cast: cast[0][0])
        return RankRound(
            copies=tuple(self.copies),
            sends=_messages(self.sends),
            receives=_messages(self.receives),
            casts=tuple(
                Message(peer=root, group=groups[group], tag=0, items=_aligned(items))
                for (group, root, _), items in casts
            ),
        )


def _messages(by_peer: dict[tuple[int, int], list[Item]]) -> tuple[Message, ...]:
    tags: dict[int, int] = {}
    messages = []
    for (peer, _), items in by_peer.items():
        tags[peer] = tags.get(peer, -1) + 1
        messages.append(Message(peer=peer, group=None, tag=tags[peer], items=_aligned(items)))
    return tuple(messages)


def _aligned(items: list[Item]) -> tuple[Item, ...]:
    if len(items) == 1:  # the case of most messages
        return (items[0],)
    return tuple(sorted(items, key=lambda item: -item[1].dtype.itemsize))
