"""`Meetings`: what the members of each group call, compared call by call.

The members of a group meet in each of its collectives: the last one to come compares all calls and
moves the data. A collective whose calls differ never happens, so its members wait until no rank
can continue; `findings` then has what each of them has called there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spmdrl.distributed.mesh import format_ranks
from spmdrl.rehearsal.lines import Stack, stack_here
from spmdrl.rehearsal.turns import Turns

Move = Callable[[Sequence["Call"]], None]
"""Moves the data of a collective, given its calls by member."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A member's call of a collective.

    Args:
        text: operation, shapes, dtypes and options, which must be equal on all members.
        given, taken: tensors that are read and written.
        sent, received: rows to and from each member, of an exchange of unequal parts.
    """

    text: str
    given: Sequence[Tensor] = ()
    taken: Sequence[Tensor] = ()
    sent: Sequence[int] = ()
    received: Sequence[int] = ()
    stack: Stack = ()


@dataclass(kw_only=True)
class Meeting:
    """One collective of a group, or one message between two ranks."""

    group: Group
    number: int
    is_message: bool = False
    calls: dict[int, Call] = field(default_factory=dict)
    """Calls by member."""
    waiting: list[int] = field(default_factory=list)
    """World ranks that wait for its end."""
    is_done: bool = False


@dataclass(kw_only=True)
class Group:
    """A group of world ranks, by its name in torch."""

    name: str
    ranks: tuple[int, ...]
    counts: list[int] = field(default_factory=list)
    """Number of collectives that each member has called."""
    open: dict[int, Meeting] = field(default_factory=dict)
    """Collectives to which members are still to come, by number."""
    messages: dict[tuple[int, int, int], deque[Meeting]] = field(default_factory=dict)
    """Messages by sender, receiver and tag that lack one of the two."""

    def describe(self) -> str:
        return f"group {self.name} of ranks {format_ranks(self.ranks)}"


@dataclass(frozen=True, kw_only=True)
class Side:
    """Call of some ranks where others make another one.

    Args:
        text: the call, or what they do instead.
    """

    ranks: tuple[int, ...]
    text: str
    stack: Stack = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A collective in which the members of a group do not meet.

    Args:
        group: description of the group.
        number: position among the group's collectives, from 1.
    """

    group: str
    number: int
    sides: tuple[Side, ...]
    is_message: bool = False


class Meetings:
    """All groups of a rehearsal.

    Args:
        strict: returns the lines of a call that must be equal on all members of its group; the
            whole stack by default.
    """

    def __init__(
        self, turns: Turns, strict: Callable[[Stack], Stack] = lambda stack: stack
    ) -> None:
        self.turns, self._strict = turns, strict
        self.notes: dict[frozenset[Stack], Finding] = {}
        """Collectives that took place, called from different lines outside `strict`'s, by these."""
        self.groups: dict[str, Group] = {}
        self.num_collectives = self.num_messages = 0
        self.paths: list[int] = [0] * turns.size
        """Digest of every rank's calls: ranks with equal ones are of one class."""
        self._waits: dict[int, Meeting] = {}

    def group(self, name: str, ranks: tuple[int, ...]) -> Group:
        """Find or make a group. ValueError: another rank has given the name to other ranks."""
        found = self.groups.setdefault(name, Group(name=name, ranks=ranks))
        if found.ranks != ranks:
            raise ValueError(
                f"process group number {name} has ranks {list(found.ranks)} on one rank and "
                f"{list(ranks)} on another: every rank must make the same groups in one order"
            )
        if not found.counts:
            found.counts += [0] * len(ranks)
        return found

    def join(self, group: Group, member: int, call: Call, move: Move) -> Meeting:
        """Enter the member's next collective; the last member to come moves the data."""
        call = replace(call, stack=stack_here())
        number = group.counts[member]
        group.counts[member] += 1
        self._note(group.ranks[member], len(group.ranks), call)
        meeting = group.open.setdefault(number, Meeting(group=group, number=number))
        meeting.calls[member] = call
        if len(meeting.calls) < len(group.ranks):
            return meeting
        calls = [meeting.calls[m] for m in range(len(group.ranks))]
        if is_agreed(calls) and len({self._strict(one.stack) for one in calls}) == 1:
            if any(one.stack != call.stack for one in calls):
                stacks = frozenset(one.stack for one in calls)
                self.notes.setdefault(stacks, self._finding(meeting))
            del group.open[number]
            self.num_collectives += 1
            with torch.inference_mode():  # buffers may be inference tensors of another thread
                move(calls)
            self._end(meeting)
        return meeting

    def send(self, group: Group, member: int, to: int, tag: int, call: Call) -> Meeting:
        """Send a message, which `receive` with the same tag takes, in order."""
        return self._match(group, (member, to, tag), member, call)

    def receive(self, group: Group, member: int, source: int, tag: int, call: Call) -> Meeting:
        return self._match(group, (source, member, tag), member, call)

    def wait(self, meeting: Meeting) -> None:
        """Wait until the meeting has taken place."""
        rank = self.turns.here()
        while not meeting.is_done:
            assert rank is not None, "a thread that is no rank waits for a collective"
            meeting.waiting.append(rank)
            self._waits[rank] = meeting
            self.turns.block()
        if rank is not None:
            self._waits.pop(rank, None)

    def _match(self, group: Group, key: tuple[int, int, int], member: int, call: Call) -> Meeting:
        call = replace(call, stack=stack_here())
        self._note(group.ranks[member], 2, call)
        pending = group.messages.setdefault(key, deque())
        meeting = next((one for one in pending if member not in one.calls), None)
        if meeting is None:
            meeting = Meeting(group=group, number=len(pending), is_message=True)
            pending.append(meeting)
        meeting.calls[member] = call
        both = [meeting.calls[m] for m in key[:2] if m in meeting.calls]
        if len(both) == 2 and is_agreed(both):
            pending.remove(meeting)
            self.num_messages += 1
            with torch.inference_mode():
                put(both[1].taken[0], both[0].given[0])
            self._end(meeting)
        return meeting

    def _end(self, meeting: Meeting) -> None:
        meeting.is_done = True
        self.turns.wake(meeting.waiting)
        meeting.waiting, meeting.calls = [], {}

    def _note(self, rank: int, size: int, call: Call) -> None:
        inner = call.stack[0] if call.stack else None
        self.paths[rank] = hash((self.paths[rank], size, call.text.split()[0], inner))

    def findings(self) -> list[Finding]:
        """Collectives that did not take place, those whose calls differ first."""
        found = []
        for group in self.groups.values():
            pending = [one for queue in group.messages.values() for one in queue]
            for meeting in (*group.open.values(), *pending):
                found.append(self._finding(meeting))
        found.sort(key=lambda one: (not _differs(one), one.number))
        return found

    def _finding(self, meeting: Meeting) -> Finding:
        ranks = meeting.group.ranks
        sides: dict[tuple[Any, ...], list[int]] = {}
        for member, call in sorted(meeting.calls.items()):
            sides.setdefault((call.text, call.stack), []).append(ranks[member])
        members = range(len(ranks))
        if meeting.is_message:
            members = range(0)
        for member in members:
            if member not in meeting.calls:
                text, stack = self._instead(ranks[member])
                sides.setdefault((text, stack), []).append(ranks[member])
        return Finding(
            group=meeting.group.describe(),
            number=meeting.number + 1,
            sides=tuple(
                Side(ranks=tuple(own), text=text, stack=stack)
                for (text, stack), own in sides.items()
            ),
            is_message=meeting.is_message,
        )

    def _instead(self, rank: int) -> tuple[str, Stack]:
        """Describe the place of a rank that did not come."""
        outcome = self.turns.outcomes[rank]
        if outcome.error is not None:
            return f"failed: {type(outcome.error).__name__}: {outcome.error}", outcome.stack
        if outcome.is_complete:
            return "ended without it", ()
        meeting = self._waits.get(rank)
        if meeting is None:
            return "polls", ()
        own = meeting.calls[meeting.group.ranks.index(rank)]
        return f"waits in {own.text}, in {meeting.group.describe()}", own.stack


def _differs(finding: Finding) -> bool:
    return len({side.text for side in finding.sides if side.stack}) > 1


def is_agreed(calls: Sequence[Call]) -> bool:
    """Whether calls of all members are one collective, or those of two ranks one message."""
    first = calls[0]
    if any(call.text != first.text for call in calls):
        return False
    if first.sent:
        return all(
            calls[i].sent[j] == calls[j].received[i]
            for i in range(len(calls))
            for j in range(len(calls))
        )
    return True


def put(tensor: Tensor, value: Tensor) -> None:
    """Write a buffer as a communication library does, unseen by autograd."""
    tensor.data.copy_(value.reshape(tensor.shape))
