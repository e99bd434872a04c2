"""Environments of the flows' tests, which answer at once and depend on the turns alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spmdrl.turns.environment import Message, Observation


class Counting:
    """Tells how long a turn was; ends where that is divisible by `modulus`, never before a second
    turn.

    Args:
        fails: the number of the turn that raises; -1: none.
    """

    def __init__(self, modulus: int = 5, fails: int = -1) -> None:
        self.modulus, self.fails, self.turns = modulus, fails, 0

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        return [{"role": "user", "content": f"Count: {row['question'][:12]}"}]

    def step(self, response: str) -> Observation:
        self.turns += 1
        if self.turns - 1 == self.fails:
            raise RuntimeError("planted")
        size = len(response.encode())
        done = self.turns > 1 and size % self.modulus == 0
        told = [{"role": "user", "content": f"{size} <|im_end|>"}]
        return Observation(messages=() if done else told, reward=size % 3 / 2, done=done)


class Saving(Counting):
    """The same, and keeps its state."""

    def save(self) -> bytes:
        return bytes([self.turns])

    def load(self, state: bytes) -> None:
        self.turns = state[0]


class Picky(Counting):
    """The same, but takes no row."""

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        raise KeyError(f"planted: {row['question']}")


class Killing(Counting):
    """The same; the first time that a sample ends a second turn while the file `armed` is there, it
    is removed and the rank that samples is killed.
    """

    def __init__(self, armed: str) -> None:
        super().__init__()
        self.armed = Path(armed)

    def step(self, response: str) -> Observation:
        if self.turns == 1 and self.armed.is_file():
            self.armed.unlink()
            server = Path(f"/proc/{os.getppid()}/stat").read_text()
            os.kill(int(server.rpartition(")")[2].split()[1]), signal.SIGKILL)
        return super().step(response)
