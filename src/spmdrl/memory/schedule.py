"""Moves between the calls of a step when every part has its residency: a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from spmdrl.memory.parts import Part, PartKey, Residency, closure, dotted


@dataclass(frozen=True, kw_only=True)
class PlannedCall:
    """A call of the step on this rank.

    Args:
        name: name for messages, such as `policy.update`.
        needs: the parts that it uses.
        fills: parts whose whole content it overwrites (a weight sync's target).
        adds_to: those of `fills` that keep some of their content if it was not dropped, and so come
            with it.
        working_bytes: device bytes in addition to parts: activations, gradients.
    """

    name: str
    needs: tuple[PartKey, ...]
    fills: tuple[PartKey, ...] = ()
    adds_to: tuple[PartKey, ...] = ()
    working_bytes: int = 0

    def all_needs(self, parts: Mapping[PartKey, Part]) -> list[PartKey]:
        return closure((*self.needs, *self.fills), parts)


@dataclass(frozen=True, kw_only=True)
class ScheduledCall:
    """A call in the steady state: the parts on the device, and the moves before it.

    Args:
        resident: the parts on the device during the call.
        moved_in: those of them that come from the host.
        made: those of them that are recreated: caches, graphs, weights that a call fills.
        moved_out: parts that go to the host before the call (a frozen part is only freed).
        dropped: parts that are freed before the call and not kept anywhere.
        bytes_in, bytes_out: bytes that are copied from and to the host.
        peak_bytes: bytes of resident parts and working memory.
        prefetch: those of the next call's `moved_in` that can come during this call.
        prefetch_bytes: their size.
    """

    name: str
    resident: tuple[PartKey, ...]
    moved_in: tuple[PartKey, ...]
    made: tuple[PartKey, ...]
    moved_out: tuple[PartKey, ...]
    dropped: tuple[PartKey, ...]
    bytes_in: int
    bytes_out: int
    peak_bytes: int
    prefetch: tuple[PartKey, ...]
    prefetch_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Moves:
    call: PlannedCall
    resident: tuple[PartKey, ...]
    entering: tuple[PartKey, ...]
    leaving: tuple[PartKey, ...]


def peak_bytes(
    call: PlannedCall, parts: Mapping[PartKey, Part], residencies: Mapping[PartKey, Residency]
) -> int:
    """Bytes on the device during the call, whatever was called before it."""
    return call.working_bytes + sum(
        parts[name].num_bytes for name in resident_during(call, parts, residencies)
    )


def resident_during(
    call: PlannedCall, parts: Mapping[PartKey, Part], residencies: Mapping[PartKey, Residency]
) -> list[PartKey]:
    """The parts that the call needs or that are kept, in the parts' order, without those that stay
    on the host.
    """
    needed = set(call.all_needs(parts))
    return [
        name
        for name, part in parts.items()
        if (name in needed or residencies[name] == "keep") and not part.on_host
    ]


def schedule(
    calls: Sequence[PlannedCall],
    parts: Mapping[PartKey, Part],
    residencies: Mapping[PartKey, Residency],
    capacity: int | None,
) -> tuple[ScheduledCall, ...]:
    """The calls of a step that follows another; before the first, only kept parts are resident.

    Args:
        capacity: bytes for parts and working memory, or None for no limit and no prefetches.
    """
    steady = _moves((*calls, *calls), parts, residencies)[len(calls) :]
    return tuple(
        _scheduled(move, steady[(i + 1) % len(steady)], parts, residencies, capacity)
        for i, move in enumerate(steady)
    )


def check_filled(
    calls: Sequence[PlannedCall],
    parts: Mapping[PartKey, Part],
    residencies: Mapping[PartKey, Residency],
    setting: str | None = None,
) -> None:
    """Check that no call of the step needs a part that was dropped and not filled since.

    Args:
        setting: the setting that makes a step have these calls, for the message.

    Raises:
        ValueError: the part's setting, the call, and the call that came between are named.
    """
    losable = [
        name
        for name, part in parts.items()
        if residencies[name] == "drop" and not part.droppable and part.num_bytes > 0
    ]
    for name, call, dropped_by in _unfilled(calls, parts, residencies, losable):
        settings = f"{parts[name].setting}=drop" + (f" with {setting}" if setting else "")
        since = f"{dropped_by} drops them, and " if dropped_by else ""
        raise ValueError(
            f"{settings}: {call} needs {dotted(name)}; {since}no call between has "
            f"filled them: set {parts[name].setting} to host or keep"
        )


def lossless_drops(
    steps: Iterable[Sequence[PlannedCall]], parts: Mapping[PartKey, Part]
) -> frozenset[PartKey]:
    """The parts that may be lost (`may_lose`) and that, dropped between their calls, every step
    fills before each use: whether they stay does not depend on what becomes of others.
    """
    asked = [name for name, part in parts.items() if part.may_lose and part.num_bytes > 0]
    residencies: dict[PartKey, Residency] = dict.fromkeys(parts, "keep")
    residencies |= dict.fromkeys(asked, "drop")
    missing: set[PartKey] = set()
    for calls in steps if asked else ():
        missing.update(name for name, _, _ in _unfilled(calls, parts, residencies, asked))
    return frozenset(asked) - missing


def _unfilled(
    calls: Sequence[PlannedCall],
    parts: Mapping[PartKey, Part],
    residencies: Mapping[PartKey, Residency],
    losable: Sequence[PartKey],
) -> Iterator[tuple[PartKey, str, str]]:
    """(part, the call that needs it, the one that dropped it or "") where nothing has filled it."""
    lost = dict.fromkeys(losable, "")
    for move in _moves((*calls, *calls), parts, residencies):
        lost |= {name: move.call.name for name in losable if name in move.leaving}
        for name in move.call.all_needs(parts):
            if name in lost and name not in move.call.fills:
                yield name, move.call.name, lost[name]
        for name in move.call.fills:
            lost.pop(name, None)


def _moves(
    calls: Sequence[PlannedCall],
    parts: Mapping[PartKey, Part],
    residencies: Mapping[PartKey, Residency],
) -> list[_Moves]:
    """Parts that enter and leave at each call; before the first, only kept parts are resident."""
    resident = {name for name in parts if residencies[name] == "keep"}
    moves = []
    for call in calls:
        now = resident_during(call, parts, residencies)
        leaving = tuple(name for name in parts if name in resident.difference(now))
        entering = tuple(name for name in now if name not in resident)
        moves.append(_Moves(call=call, resident=tuple(now), entering=entering, leaving=leaving))
        resident = set(now)
    return moves


def _scheduled(
    move: _Moves,
    following: _Moves,
    parts: Mapping[PartKey, Part],
    residencies: Mapping[PartKey, Residency],
    capacity: int | None,
) -> ScheduledCall:
    def of(names: Sequence[PartKey], *, host: bool) -> tuple[PartKey, ...]:
        return tuple(name for name in names if (residencies[name] == "host") == host)

    def copied(entering: _Moves) -> tuple[PartKey, ...]:
        """Those that enter with their content: a call that overwrites all of it needs none."""
        call = entering.call
        overwritten = set(call.fills).difference(call.needs, call.adds_to)
        return tuple(n for n in of(entering.entering, host=True) if n not in overwritten)

    def total(names: Sequence[PartKey]) -> int:
        return sum(parts[name].num_bytes for name in names)

    moved_in, moved_out = copied(move), of(move.leaving, host=True)
    peak = move.call.working_bytes + total(move.resident)
    prefetch: list[PartKey] = []
    coming = copied(following)
    for name in coming:
        own = [n for n in closure((name,), parts) if n in coming and n not in prefetch]
        if capacity is not None and peak + total([*prefetch, *own]) <= capacity:
            prefetch += own
    return ScheduledCall(
        name=move.call.name,
        resident=move.resident,
        moved_in=moved_in,
        made=tuple(name for name in move.entering if name not in moved_in),
        moved_out=moved_out,
        dropped=of(move.leaving, host=False),
        bytes_in=total(moved_in),
        bytes_out=total([name for name in moved_out if not parts[name].frozen]),
        peak_bytes=peak,
        prefetch=tuple(prefetch),
        prefetch_bytes=total(prefetch),
    )
