"""`Ledger`: what a run keeps of its role calls.

`together` looks it up in the context (`keeping`), so that roles, flows and what users write need
not carry it. Without one nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import TYPE_CHECKING

from spmdrl.launch import World
from spmdrl.runtime.pulse import Pulse, Stage

if TYPE_CHECKING:
    # documented as torch.distributed.Store, but torch's stubs do not re-export it
    from torch._C._distributed_c10d import Store

_KEPT_MEETINGS = 64
"""Meetings whose keys stay in the store; no rank is so many role calls behind another."""


class Diverged(RuntimeError):
    """Ranks make different role calls: the first to notice raises, before it could hang."""


class Ledger:
    """One rank's.

    Args:
        prefix: of its keys in the store: unique for the run.
        pulse: told of every call and its stages.
    """

    def __init__(self, world: World, prefix: str, pulse: Pulse) -> None:
        self._rank, self._size, self._is_first = world.rank, world.size, world.is_first
        self._store: Store = world.connect(f"{prefix}/calls")
        self._pulse = pulse
        self._history = b""
        self._meetings = 0

    def enter(self, name: str, shapes: str) -> None:
        """A call begins; all ranks of the world shall come to this place in one order.

        Args:
            name: `role.method`, of all calls of a `together`.
            shapes: its columns; equal on all ranks.

        Raises:
            Diverged: another rank came to another call, or by another way.
        """
        self._pulse.at_call(name, "sending")
        self._meet(f"{name}({shapes})")

    def stage(self, stage: Stage) -> None:
        self._pulse.at_call(self._pulse.position.call, stage)

    def _meet(self, what: str) -> None:
        """Compare notes through the store: who comes first leaves them, the others read."""
        if self._size == 1:
            return
        self._history = blake2b(self._history + what.encode(), digest_size=8).digest()
        here = f"rank {self._rank}, step {self._pulse.position.step}: {what}"
        mine = f"{self._history.hex()} {here}"
        key = f"{self._meetings}"
        found = self._store.compare_set(key, "", mine).decode()
        theirs, _, there = found.partition(" ")
        if theirs != self._history.hex():
            raise Diverged(
                f"role call {self._meetings + 1} of the run is not the same on all ranks. {there}; "
                f"{here}. A flow must make the same calls on every rank, with columns of the same "
                "kind: look for a branch on a value that differs between ranks"
            )
        if self._is_first and self._meetings >= _KEPT_MEETINGS:
            self._store.delete_key(f"{self._meetings - _KEPT_MEETINGS}")
        self._meetings += 1


_CURRENT: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def keeping(ledger: Ledger) -> Iterator[None]:
    """Role calls inside are entered into the ledger."""
    token = _CURRENT.set(ledger)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Ledger | None:
    """The ledger of the run that goes on, if there is one."""
    return _CURRENT.get()
