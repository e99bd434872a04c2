"""`Pulse`: this rank's position and its last progress, for the watcher and for people."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal

Stage = Literal["between", "sending", "computing", "returning"]
STAGES: tuple[Stage, ...] = ("between", "sending", "computing", "returning")


@dataclass(frozen=True, kw_only=True)
class Position:
    """Position of a rank in a flow.

    Args:
        step: step of the flow; -1 before the first.
        calls: number of role calls begun since the start.
        stage: stage of the newest call; `between` when it is done.
        call: name of the newest call, `role.method`.
    """

    step: int = -1
    calls: int = 0
    stage: Stage = "between"
    phase: str = "start"
    call: str = ""

    def order(self) -> tuple[int, int, int]:
        """Sorting key; the least rank is behind. A finished call counts as in its last stage."""
        return self.step, self.calls, STAGES.index(self.stage) or len(STAGES)

    def describe(self) -> str:
        where = f"in {self.call} ({self.stage})" if self.stage != "between" else "between calls"
        return f"step {self.step}, phase {self.phase}, {where}, call number {self.calls}"


class Pulse:
    """Position and progress, written by the main thread (and by savers), read by the watcher's."""

    def __init__(self) -> None:
        self.position = Position()
        self.beats = 0
        self.moved = time.monotonic()
        """Time of the last progress, by the monotonic clock."""

    def beat(self) -> None:
        """Note progress: an engine step, a microbatch, a piece of a file."""
        self.beats += 1
        self.moved = time.monotonic()

    def at_step(self, step: int) -> None:
        self._move(replace(self.position, step=step))

    def at_call(self, call: str, stage: Stage) -> None:
        """Note that the newest call enters a stage; `sending` begins a new call."""
        calls = self.position.calls + (stage == "sending")
        self._move(replace(self.position, call=call, stage=stage, calls=calls))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self.position.phase
        self._move(replace(self.position, phase=name))
        try:
            yield
        finally:
            self._move(replace(self.position, phase=outer))

    def heartbeat(self, rank: int) -> str:
        """One line of JSON: rank, position, beats, and the seconds since the last progress."""
        content = {
            "rank": rank,
            **asdict(self.position),
            "beats": self.beats,
            "quiet_s": round(time.monotonic() - self.moved, 1),
            "time": round(time.time(), 1),
        }
        return json.dumps(content) + "\n"

    def _move(self, position: Position) -> None:
        self.position = position
        self.beat()


def behind(heartbeats: Mapping[int, str], size: int) -> str:
    """Describe the ranks that are behind, and the positions of both sides, from the heartbeats."""
    found: dict[int, tuple[Position, float]] = {}
    for rank, line in heartbeats.items():
        try:
            content = json.loads(line)
        except ValueError:  # incomplete: its machine crashed
            continue
        position = Position(**{name: content[name] for name in asdict(Position())})
        found[rank] = position, content["quiet_s"]
    missing = sorted(set(range(size)) - set(found))
    if missing:
        return f"ranks {missing} have no heartbeat"
    order = {rank: position.order() for rank, (position, _) in found.items()}
    least = min(order.values())
    last = [rank for rank in order if order[rank] == least]
    texts = [f"ranks {last} are behind: {_where(found, last[0])}"]
    if len(last) == size:
        quietest = max(found, key=lambda rank: found[rank][1])
        texts = [f"all ranks are at one place: {_where(found, quietest)}"]
    ahead = sorted(set(range(size)) - set(last))
    if ahead:
        texts.append(f"rank {ahead[0]} is ahead: {_where(found, ahead[0])}")
    return "; ".join(texts)


def _where(found: Mapping[int, tuple[Position, float]], rank: int) -> str:
    position, quiet = found[rank]
    return f"{position.describe()}, no progress for {quiet:.0f} s on rank {rank}"
