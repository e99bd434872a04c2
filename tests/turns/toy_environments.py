"""Environments for tests; a row's `trouble` says what goes wrong, at its turn `at`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spmdrl.turns.environment import Message, Observation


class Counting:
    """Answers that depend on all turns before: numbers, which the toy renderer takes as tokens."""

    def __init__(self, folder: str | None = None, sleep_s: float = 0.0) -> None:
        self.folder, self.sleep_s = folder, sleep_s
        self.row: Mapping[str, Any] = {}
        self.turns: list[str] = []
        self.child: subprocess.Popen[bytes] | None = None

    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        self.row = row
        self._note("start")
        if row.get("trouble") == "start":
            raise KeyError("no such level")
        content = str(row["number"])
        if row.get("trouble") == "other start" and not self._first("start"):
            content += " 7"
        return [{"role": "user", "content": content}]

    def step(self, response: str) -> Observation:
        number = len(self.turns)
        self.turns.append(response)
        self._note("step")
        time.sleep(self.sleep_s)
        if number == self.row.get("at", 0) and "trouble" in self.row:
            return self._trouble(self.row["trouble"], number)
        return self._answer(number)

    def close(self) -> None:
        self._note("close")

    def tools(self) -> list[Any]:
        return [{"type": "function", "function": {"name": f"tool {self.row['number']}"}}]

    def _answer(self, number: int) -> Observation:
        digits = sum(map(ord, "".join(self.turns))) + self.row["number"]
        given = [(digits + 13 * k) % 100 + 6 for k in range(1 + digits % 5)]
        return Observation(
            messages=[{"role": "tool", "content": " ".join(map(str, given))}],
            reward=number + digits / 7,
            done=number + 1 >= self.row.get("turns", 3),
            metrics={"turns": 1, "numbers": len(given)},
        )

    def _trouble(self, trouble: str, number: int) -> Observation:
        found: Any = self._answer(number)
        if trouble == "raise":
            raise RuntimeError("the level is lost")
        if trouble == "exit":
            raise SystemExit(3)
        if trouble == "once" and not self._first("once"):
            return self._answer(number)
        if trouble in ("kill", "once"):
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "hang":
            self.child = subprocess.Popen(["sleep", "1000"])
            self._note(f"child {self.child.pid}")
            time.sleep(1000)
        if trouble == "spin":
            while True:
                pass
        if trouble == "memory":
            self.turns.append("x" * 2**33)
        if trouble == "nan":
            found = Observation(messages=found.messages, reward=float("nan"))
        if trouble == "word":
            found = Observation(messages=found.messages, reward="1.0")  # type: ignore[arg-type]
        if trouble == "metric":
            found = Observation(metrics={"calls": "2"})  # type: ignore[dict-item]
        if trouble == "infinite":
            found = Observation(metrics={"calls": float("inf")})
        if trouble == "text":
            found = "right"
        if trouble == "assistant":
            found = Observation(messages=[{"role": "assistant", "content": "7"}])
        if trouble == "no role":
            found = Observation(messages=[{"content": "7"}])
        if trouble == "no json":
            found = Observation(messages=[{"role": "user", "content": object()}])
        if trouble == "surrogate":
            found = Observation(messages=[{"role": "user", "content": "\ud800"}])
        if trouble == "long":
            found = Observation(messages=[{"role": "user", "content": "7" * 2**23}])
        if trouble == "differs":
            tail = os.urandom(4).hex()
            found = Observation(messages=[{"role": "user", "content": str(int(tail, 16))}])
        if trouble == "end":
            found = Observation(reward=5.0)
        return found

    def _note(self, what: str) -> None:
        if self.folder is not None:
            with (Path(self.folder) / "calls").open("a") as file:
                file.write(f"{self.row.get('number')} {what}\n")

    def _first(self, what: str) -> bool:
        """Whether this is the first time that somebody asks, of all processes."""
        assert self.folder is not None
        try:
            (Path(self.folder) / f"{self.row['number']} {what}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Saving(Counting):
    """The same with states."""

    def save(self) -> bytes:
        return "\n".join([str(dict(self.row)), *self.turns]).encode()

    def load(self, state: bytes) -> None:
        row, *self.turns = state.decode().split("\n")
        self.row = eval(row)
        self._note("load")


class Special(Counting):
    special_tokens = True


class Stateless:
    def start(self, row: Mapping[str, Any]) -> Sequence[Message]:
        return []


class Half(Counting):
    def save(self) -> bytes:
        return b""


class Waiting(Counting):
    """Sleeps for as long as its row says."""

    def step(self, response: str) -> Observation:
        time.sleep(self.row["sleep_s"])
        return super().step(response)
