"""`Signs`: signs of life in the store, by which ranks that died silently are found."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # documented as torch.distributed.Store, but torch's stubs do not re-export it
    from torch._C._distributed_c10d import Store

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
