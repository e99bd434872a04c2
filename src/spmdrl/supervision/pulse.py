"""`Pulse`: this rank's position and its last progress, for the watcher and for people. `Signs`:
signs of life in the store, by which ranks that died silently are found.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    # documented as torch.distributed.Store, but torch's stubs do not re-export it
    from torch._C._distributed_c10d import Store


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


SIGN_S, DEAD_S = 2.0, 12.0
"""Seconds between signs of life of a rank, and the silence after which a rank counts as dead while
the job is ending."""


class Signs:
    """This rank's seat (host and process) and signs, and those of the others as far as known.

    Once all ranks have a seat, reading all signs is one request to the store for any number of
    ranks.

    Args:
        store: the caller's own connection.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._host = socket.gethostname()
        self._unseated = list(range(size))
        self._seats: dict[int, tuple[str, int]] = {}
        self._newest: dict[int, tuple[bytes, float]] = {}
        """Rank -> its newest sign of life, and the time at which it came."""
        self._next_sign = self._next_look = 0.0
        self._set_sign()
        store.set(f"seat/{rank}", f"{self._host} {os.getpid()}")

    def give(self) -> None:
        """Give a sign of life if one is due."""
        if time.monotonic() >= self._next_sign:
            self._next_sign = time.monotonic() + SIGN_S
            self._set_sign()

    def dead(self) -> list[int]:
        """Ranks whose process is gone, or without a sign for `DEAD_S`, unless they ended well."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + SIGN_S
            self._find_seats()
            self._read(now)
        silent = [rank for rank, (_, came) in self._newest.items() if now - came > DEAD_S]
        gone = [
            rank
            for rank, (host, pid) in self._seats.items()
            if host == self._host and not lives(pid)
        ]
        found = sorted({*silent, *gone})
        return [rank for rank in found if not self._store.check([f"ended/{rank}"])]

    def _set_sign(self) -> None:
        self._store.set(f"sign/{self._rank}", str(time.monotonic_ns()))

    def _find_seats(self) -> None:
        if not self._unseated:
            return
        if self._store.check([f"seat/{rank}" for rank in self._unseated]):
            found = self._unseated
        else:
            found = [rank for rank in self._unseated if self._store.check([f"seat/{rank}"])]
        for rank, seat in self._values("seat", found).items():
            host, pid = seat.decode().split()
            self._seats[rank] = host, int(pid)
        self._unseated = [rank for rank in self._unseated if rank not in self._seats]

    def _read(self, now: float) -> None:
        signs = {**dict.fromkeys(self._unseated, b""), **self._values("sign", list(self._seats))}
        for rank, sign in signs.items():
            if self._newest.get(rank, (None, now))[0] != sign:
                self._newest[rank] = sign, now

    def _values(self, key: str, ranks: list[int]) -> dict[int, bytes]:
        values = self._store.multi_get([f"{key}/{rank}" for rank in ranks]) if ranks else []
        return dict(zip(ranks, values, strict=True))


def lives(pid: int) -> bool:
    """Whether a process of this host runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
