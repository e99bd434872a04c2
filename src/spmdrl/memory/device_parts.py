"""`DeviceParts`: moves the parts of this rank's roles to its device and away.

`prepare` precedes every call, and moves parts out before it moves others in. Parts that a call
leaves on the device stay until a call that does not need them, so consecutive calls of one role
move nothing.

Cost of the moves of parts between two readings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from spmdrl.memory.mover import Mover, Ticket
from spmdrl.memory.parts import PartKey, closure, dotted
from spmdrl.memory.registry import PartRegistry
from spmdrl.memory.storages import is_resident, local_part

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


class DeviceParts:
    """The parts of this rank's roles on a device.

    Args:
        device: device of the parts.
        capacity: bytes that parts and working memory may take with prefetches; None prevents these.
        staging_bytes: see `Mover`.

    `registry` takes charge of parts.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        capacity: int | None = None,
        staging_bytes: int | None = None,
    ) -> None:
        self._capacity = capacity
        self.registry = PartRegistry(Mover(device, staging_bytes=staging_bytes))
        self._pins: list[frozenset[PartKey]] = []
        self.meter = Meter()
        """Counts copies; others that copy between host and device report theirs to it."""

    def prepare(
        self, needs: Sequence[PartKey], *, fills: Sequence[PartKey] = (), exclusive: bool = True
    ) -> None:
        """Bring the parts that a call needs, after sending away the others that may go.

        Pinned and kept parts stay. The current stream must be the one that the call computes on.

        Args:
            needs: the parts of the call; parts that they rest on or hold come too.
            fills: parts whose whole content the call writes; they come without content, and it
                calls `filled` when it has written them.
            exclusive: send the others away; without it everything stays, see `has_room`.

        Raises:
            ValueError: a part is unknown, or was dropped and not filled since.
        """
        wanted, tensors = closure((*needs, *fills), self.registry.by_key), self.registry.tensors
        for name in wanted:
            if name in tensors and name not in fills and not tensors[name].is_filled:
                setting = self.registry.by_key[name].setting
                raise ValueError(
                    f"role {name[0]!r}: its {name[1]} were dropped, and nothing has filled them "
                    f"since: sync them before this call, or set {setting}=host"
                )
        self._exchange(wanted, written=fills, exclusive=exclusive)

    def has_room(self, needs: Sequence[PartKey], working_bytes: int) -> bool:
        """Whether these parts fit in addition to all resident ones; False without a capacity."""
        if self._capacity is None:
            return False
        missing = sum(self.registry.size(name) for name in self._missing(needs))
        return self.registry.resident_bytes() + working_bytes + missing <= self._capacity

    def _missing(self, needs: Sequence[PartKey]) -> list[PartKey]:
        wanted, tensors = closure(needs, self.registry.by_key), self.registry.tensors
        return [name for name in wanted if name in tensors and tensors[name].is_away]

    def prefetch(self, needs: Sequence[PartKey], *, working_bytes: int = 0) -> bool:
        """Start bringing a later call's parts while the current call runs, if there is room.

        Call it between the current call's `prepare` and its computation: the copies wait for the
        work that the device has queued before. The later call's `prepare` waits for the copies.

        Args:
            working_bytes: bytes that the current call has yet to allocate.

        Returns: whether there was room; without it, or without a capacity, nothing moves.
        """
        if not self.has_room(needs, working_bytes):
            return False
        for name in self._missing(needs):
            self._bring(name)
        self._note_peak()
        return True

    @contextmanager
    def resident(self, role: str, *parts: str) -> Iterator[None]:
        """Bring these parts, and keep them during all calls inside the `with` block.

        Parts that were dropped come too, with undefined content, so that they can be filled.

        Raises:
            ValueError: a part is unknown, or none is named.
        """
        if not parts:
            raise ValueError(f"resident({role!r}): name the parts to hold")
        wanted = closure([(role, part) for part in parts], self.registry.by_key)
        pin = frozenset(wanted)
        self._pins.append(pin)
        try:
            self._exchange(wanted)
            yield
        finally:
            self._pins.remove(pin)

    def filled(self, role: str, part: str) -> None:
        """Note that the part's whole content was written after it had been dropped.

        Raises:
            ValueError: the part is unknown, has no tensors, or is not on the device.
        """
        held = self.registry.tensors.get((role, part))
        if held is None or held.is_away:
            raise ValueError(
                f"filled({role!r}, {part!r}): no tensors of that part are on the device; parts "
                f"with tensors are {[dotted(name) for name in self.registry.tensors]}"
            )
        held.filled()

    def view(self, tensor: Tensor) -> Tensor:
        """Return the tensor with the current values: itself, or the host's copy while its part is
        away. Checkpoints read and write through it without a move: values that are written to the
        host's copy come to the device with the part.

        Raises:
            ValueError: the part was dropped.
        """
        local, owner = local_part(tensor), self.registry.owner(tensor)
        if local.numel() == 0:  # an empty shard, whatever its storage is padded to
            return tensor
        is_away = owner is not None and self.registry.tensors[owner].is_away
        if is_resident(tensor) and not is_away:
            if owner is not None:  # it may be coming, and a writer would outdate the host's copy
                read_only = self.registry.by_key[owner].frozen
                self.registry.tensors[owner].hand_out(read_only=read_only, stays=False)
            return tensor
        assert owner is not None, tuple(tensor.shape)
        if not self.registry.tensors[owner].is_filled:
            raise ValueError(f"part {dotted(owner)} was dropped, and nothing has filled it since")
        return self.registry.tensors[owner].host_view(local)

    def settle(self) -> None:
        """Send away all parts that are not kept or pinned.

        Called after each role was built, it keeps the peak of building below the sum of all roles.
        """
        self._note_peak()
        self._send_away(frozenset())

    def take_metrics(self) -> dict[str, float]:
        """Return bytes and seconds of moves since the last call; see `Meter.take`."""
        return self.meter.take(self.registry.resident_bytes())

    def _exchange(
        self, wanted: Sequence[PartKey], written: Sequence[PartKey] = (), *, exclusive: bool = True
    ) -> None:
        """Let the current stream use `wanted`; if `exclusive`, send away all parts that may go."""
        self._note_peak()  # with the memory that the last call has allocated
        if exclusive:
            self._send_away(frozenset(wanted))
        here = [name for name in wanted if name in self.registry.tensors]
        for name in here:
            if self.registry.tensors[name].is_away:
                self._bring(name, empty=name in written)
        for name in here:
            read_only = self.registry.by_key[name].frozen and name not in written
            stays = self.registry.residencies[name] == "keep"
            self.registry.tensors[name].hand_out(read_only=read_only, stays=stays)
        self._note_peak()

    def _send_away(self, wanted: frozenset[PartKey]) -> None:
        stay, registry = wanted.union(*self._pins), self.registry
        leaving = {n for n, residency in registry.residencies.items() if residency != "keep"}
        leaving |= {n for n, held in registry.droppables.items() if held.is_too_large}
        leaving -= stay
        # Captures are dropped before the parts that they point into, which were registered earlier.
        for name, droppable in reversed(registry.droppables.items()):
            targets = closure(registry.by_key[name].holds, registry.by_key)
            if name in leaving or leaving.intersection(targets):
                assert name not in stay, (name, sorted(stay))
                droppable.drop()
        going = [n for n, held in registry.tensors.items() if n in leaving and not held.is_away]
        for name in going:
            if registry.residencies[name] == "drop":
                registry.tensors[name].lose()
        hosted = [registry.tensors[n] for n in going if registry.residencies[n] == "host"]
        started = [(held, held.start_leaving()) for held in hosted]
        for held, ticket in started:
            if ticket is not None:
                ticket.finish()
                self.meter.copied("to_host", ticket)
            held.leave()

    def _bring(self, name: PartKey, *, empty: bool = False) -> None:
        ticket = self.registry.tensors[name].bring(empty=empty)
        if ticket is not None:
            self.meter.copied("to_device", ticket)

    def _note_peak(self) -> None:
        self.meter.resident(self.registry.resident_bytes())
