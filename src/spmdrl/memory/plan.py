"""The memory plan of a rank: a pure function of its parts' sizes, a step's calls, and capacity.

Parts move only between calls, out before in: the peak of a call is the parts it needs, the kept
parts, and its working memory. `auto` keeps everything if every call fits. Otherwise it sends parts
away, one at a time, choosing the cheapest that helps a call that does not fit:

1. parts that their role recreates at no cost (a KV cache without graphs over it), or that a call of
   the step overwrites before each use (weights that a sync fills): nothing is copied
2. optimizer states, used by one call of the step
3. other parts, those of the fewest calls first, larger ones first
4. parts that CUDA graphs hold addresses of, and the graphs, which every step then captures again
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from spmdrl.memory.parts import (
    Part,
    PartKey,
    Residency,
    by_key,
    check_captures,
    closure,
    dotted,
    size_text,
)
from spmdrl.memory.schedule import (
    PlannedCall,
    ScheduledCall,
    check_filled,
    lossless_drops,
    peak_bytes,
    resident_during,
    schedule,
)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The residency of each part, and the parts that each call of a step finds and moves.

    Args:
        rank: rank of the plan; ranks with other roles have other plans.
        capacity: bytes for parts and working memory, or None for no limit.
        parts: the parts as given to `make_plan`.
        residencies: residency of every part, with `auto` decided.
        calls: the step's calls in the steady state.
    """

    rank: int
    capacity: int | None
    parts: tuple[Part, ...]
    residencies: Mapping[PartKey, Residency]
    calls: tuple[ScheduledCall, ...]

    @property
    def peak_bytes(self) -> int:
        return max((call.peak_bytes for call in self.calls), default=0)

    @property
    def fits(self) -> bool:
        """Whether every call fits; a plan that was made in spite of that says False."""
        return self.capacity is None or self.peak_bytes <= self.capacity

    @property
    def recaptured(self) -> tuple[PartKey, ...]:
        """Parts with captured addresses that are recreated in every step."""
        made = {name for call in self.calls for name in call.made}
        captures = [part for part in self.parts if part.is_capture or part.holds]
        return tuple(part.key for part in captures if part.key in made)

    def describe(self, ranks: str | None = None) -> str:
        """The schedule as text: the parts and their residencies, then the moves before each call.

        Args:
            ranks: names of all ranks with this plan, if there are others.
        """
        room = "no bound" if self.capacity is None else size_text(self.capacity)
        whose = f"rank {self.rank}" if ranks is None else ranks
        lines = [f"memory of {whose}: {room}; peak {size_text(self.peak_bytes)}{self._where()}"]
        for part in self.parts:
            size = size_text(part.num_bytes or part.on_host)
            lines.append(f"  {dotted(part.key):<24} {size:>14}  {self._residency_text(part)}")
        if all(residency == "keep" for residency in self.residencies.values()):
            there = any(part.on_host for part in self.parts)
            what = " between calls" if there else ": all of it stays on the device"
            return "\n".join([*lines, f"  nothing moves{what}"])
        blocks = ["\n".join(_call_lines(call)) for call in self.calls]
        for block, count in Counter(blocks).items():
            first, *rest = block.split("\n")
            lines += [first if count == 1 else f"{first}, {count} times", *rest]
        return "\n".join(lines)

    def _where(self) -> str:
        """The call with the peak, and its working memory."""
        if not self.calls:
            return ""
        call = max(self.calls, key=lambda call: call.peak_bytes)
        sizes = {part.key: part.num_bytes for part in self.parts}
        working = call.peak_bytes - sum(sizes[name] for name in call.resident)
        return f" in {call.name}, {size_text(working)} of it working memory"

    def _residency_text(self, part: Part) -> str:
        if part.on_host:
            return "stays on the host"
        text: str = self.residencies[part.key]
        if part.wish == "auto":
            text += " (auto)"
        if part.rests_on:
            text += f", plus what it shares with {_names(part.rests_on)}"
        if part.is_capture or part.holds:
            again = part.key in self.recaptured
            text += ", captured again in every step" if again else ", captured once"
        return text


def make_plan(
    parts: Sequence[Part],
    calls: Sequence[PlannedCall],
    *,
    capacity: int | None,
    rank: int = 0,
    other_steps: Mapping[str, Sequence[PlannedCall]] | None = None,
    refuses: bool = True,
) -> MemoryPlan:
    """Decide every `auto`, and lay out the step.

    Args:
        parts: the parts of all roles on this rank; those that others refer to come first.
        calls: the calls of a step, in order, without those of roles on other ranks.
        capacity: bytes for parts and working memory of this rank, or None for no limit.
        rank: this rank, for messages.
        other_steps: steps with the same calls in another order, or repeated, by the setting that
            causes them.
        refuses: False: also plan calls that do not fit, see `MemoryPlan.fits`.

    Raises:
        ValueError: a call does not fit (with a table of sizes), graphs are to be kept over parts
            that move, a dropped part is never filled, a part is unknown.
    """
    known = by_key(parts)
    steps = (calls, *(other_steps or {}).values())
    residencies = _resolve(known, calls, capacity, lossless_drops(steps, known))
    check_captures(known, residencies)
    for setting, other in (other_steps or {}).items():
        check_filled(other, known, residencies, setting)
    check_filled(calls, known, residencies)
    if refuses and capacity is not None:
        over = [call for call in calls if peak_bytes(call, known, residencies) > capacity]
        if over:
            worst = max(over, key=lambda call: peak_bytes(call, known, residencies))
            raise ValueError(_refusal(worst, known, residencies, capacity, rank))
    return MemoryPlan(
        rank=rank,
        capacity=capacity,
        parts=tuple(parts),
        residencies=residencies,
        calls=schedule(calls, known, residencies, capacity),
    )


def fits(parts: Sequence[Part], call: PlannedCall, capacity: int | None) -> bool:
    """Whether the call fits once all parts that it does not need and that may go are away."""
    return capacity is None or least_peak(parts, call, capacity) <= capacity


def least_peak(parts: Sequence[Part], call: PlannedCall, capacity: int) -> int:
    """Peak of the call in bytes once as many parts are away as it takes to fit, if it can."""
    known = by_key(parts)
    return peak_bytes(call, known, _resolve(known, [call], capacity))


def _resolve(
    parts: Mapping[PartKey, Part],
    calls: Sequence[PlannedCall],
    capacity: int | None,
    lossless: Collection[PartKey] = (),
) -> dict[PartKey, Residency]:
    """Residencies with which every call fits, as far as moving `auto` parts can achieve it.

    Args:
        lossless: parts that lose nothing by being dropped.
    """
    residencies: dict[PartKey, Residency] = {
        name: "keep" if part.wish == "auto" else part.wish for name, part in parts.items()
    }
    needs = [set(call.all_needs(parts)) for call in calls]
    held_fast = _keepers(parts)
    _drop_captures(parts, residencies)
    while capacity is not None:
        over = [
            needed
            for call, needed in zip(calls, needs, strict=True)
            if peak_bytes(call, parts, residencies) > capacity
        ]
        bound = _bound(parts, residencies)
        candidates = [
            part
            for name, part in parts.items()
            if part.wish == "auto" and residencies[name] == "keep" and part.num_bytes > 0
            if name not in held_fast and any(name not in needed for needed in over)
        ]
        if not candidates:
            break
        first = min(candidates, key=lambda part: _cost(part, bound, needs, lossless))
        residencies[first.key] = "drop" if first.key in lossless else first.away
        _drop_captures(parts, residencies)
    return residencies


def _cost(
    part: Part, bound: set[PartKey], needs: Sequence[set[PartKey]], lossless: Collection[PartKey]
) -> tuple[int, bool, int, int, PartKey]:
    """Sort key of the order in which parts are sent away; see the top of the file."""
    if part.key in bound:
        kind = 3
    elif part.droppable or part.key in lossless:
        kind = 0
    else:
        kind = 1 if part.name == "optimizer" else 2
    num_calls = sum(part.key in needed for needed in needs)
    return kind, not part.droppable, num_calls, -part.num_bytes, part.key


def _bound(parts: Mapping[PartKey, Part], residencies: Mapping[PartKey, Residency]) -> set[PartKey]:
    """Kept captures and the parts that they hold addresses of."""
    captures = [n for n, part in parts.items() if part.holds and residencies[n] == "keep"]
    return set(closure(captures, parts))


def _drop_captures(parts: Mapping[PartKey, Part], residencies: dict[PartKey, Residency]) -> None:
    """Send captures with `auto` away if a part that they hold addresses of moves."""
    for name, part in parts.items():
        moving = any(residencies[held] != "keep" for held in closure(part.holds, parts))
        if part.wish == "auto" and moving:
            residencies[name] = part.away


def _refusal(
    call: PlannedCall,
    parts: Mapping[PartKey, Part],
    residencies: Mapping[PartKey, Residency],
    capacity: int,
    rank: int,
) -> str:
    """Message for a call that does not fit: the size of each part, and the settings to change."""
    needed = set(call.all_needs(parts))
    resident = [parts[n] for n in resident_during(call, parts, residencies) if parts[n].num_bytes]
    roles = list(dict.fromkeys(part.role for part in resident))
    keepers = _keepers(parts)
    lines = [
        f"{'roles' if len(roles) > 1 else 'role'} {_and(roles)} need{'s' * (len(roles) == 1)} "
        f"{size_text(peak_bytes(call, parts, residencies))} on rank {rank} during {call.name}, the "
        f"device has {size_text(capacity)}:"
    ]
    fixes: dict[str, None] = {}
    for part in resident:
        why = "needed"
        if part.fixed:
            why = "always there"
        elif part.key not in needed:
            keeper = keepers.get(part.key, part)
            why = f"kept by {keeper.setting}=keep"
            fixes[f"{keeper.setting}={keeper.away}"] = None
        lines.append(f"  {dotted(part.key):<24} {size_text(part.num_bytes):>14}  {why}")
    lines.append(f"  {'working memory':<24} {size_text(call.working_bytes):>14}")
    if fixes:
        lines.append(f"set {' or '.join(fixes)}")
    else:
        lines.append(
            f"all of it is needed at once: give {_and(roles)} more ranks (dp_shard, tp), or lower "
            "train.microbatch_tokens, rollout.kv_cache_gb or rollout.sync_bucket_mb"
        )
    return "\n".join(lines)


def _keepers(parts: Mapping[PartKey, Part]) -> dict[PartKey, Part]:
    """Parts that may not move because kept captures hold them, and those captures themselves."""
    return {
        name: part
        for part in parts.values()
        if part.wish == "keep"
        for name in closure(part.holds, parts)
    }


def _call_lines(call: ScheduledCall) -> list[str]:
    lines = [f"  {call.name}: peak {size_text(call.peak_bytes)} with {_names(call.resident)}"]
    if call.moved_out:
        lines.append(
            f"    out  {_names(call.moved_out)}: {size_text(call.bytes_out)} copied to the host"
        )
    if call.dropped:
        lines.append(f"    free {_names(call.dropped)}")
    if call.moved_in:
        lines.append(f"    in   {_names(call.moved_in)}: {size_text(call.bytes_in)}")
    if call.made:
        lines.append(f"    made {_names(call.made)}")
    if call.prefetch:
        ahead = f"{_names(call.prefetch)}: {size_text(call.prefetch_bytes)} for the next call"
        lines.append(f"    meanwhile {ahead}")
    return lines


def _names(names: Sequence[PartKey]) -> str:
    return ", ".join(dotted(name) for name in names) or "nothing"


def _and(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
