"""Cost of the moves of parts between two readings."""

from __future__ import annotations

from typing import Literal

from spmdrl.memory.mover import Ticket

Direction = Literal["to_host", "to_device"]

_DIRECTIONS: tuple[Direction, ...] = ("to_host", "to_device")


class Meter:
    """Adds up copies, and keeps the maximum of resident bytes."""

    def __init__(self) -> None:
        self._running: list[tuple[Direction, Ticket]] = []
        self._bytes = dict.fromkeys(_DIRECTIONS, 0)
        self._seconds = dict.fromkeys(_DIRECTIONS, 0.0)
        self._peak = 0

    def copied(self, direction: Direction, ticket: Ticket) -> None:
        """Count a copy that has been started."""
        self._running.append((direction, ticket))
        self._collect(only_done=True)

    def resident(self, num_bytes: int) -> None:
        """Count the bytes that are on the device now."""
        self._peak = max(self._peak, num_bytes)

    def take(self, num_bytes: int) -> dict[str, float]:
        """Return the sums since the last reading; `num_bytes` are resident now.

        Returns:
            `peak_resident_bytes`, and for `to_host` and `to_device` `_bytes`, `_seconds` (of the
            copies, without the waits before them) and `_gb_per_s` (10^9; 0 without copies).
        """
        self.resident(num_bytes)
        self._collect(only_done=False)
        found = {"peak_resident_bytes": float(self._peak)}
        for name in _DIRECTIONS:
            count, seconds = self._bytes[name], self._seconds[name]
            found[f"{name}_bytes"] = float(count)
            found[f"{name}_seconds"] = seconds
            found[f"{name}_gb_per_s"] = count / seconds / 1e9 if seconds > 0 else 0.0
            self._bytes[name], self._seconds[name] = 0, 0.0
        self._peak = num_bytes
        return found

    def _collect(self, *, only_done: bool) -> None:
        """Move copies from the list into the sums, which keeps the list short."""
        running = []
        for name, ticket in self._running:
            if only_done and not ticket.is_done():
                running.append((name, ticket))
                continue
            self._bytes[name] += ticket.num_bytes
            self._seconds[name] += ticket.seconds()
        self._running = running
