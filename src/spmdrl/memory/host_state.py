"""`HostState`: float32 tensors that live on the host and pass through the device in windows.

Copies in, computation and copies out overlap: while one window comes, the one before it is computed
with or goes, each direction on a stream of its own, so that both directions of the bus are in use.
Two windows have a place on the device; each place is used again by the next window but one.

ZeRO-Infinity moves an optimizer's state so (Rajbhandari et al. 2021,
https://arxiv.org/abs/2104.07857, section 5.2.2).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from spmdrl.memory.arena import ALIGNMENT, HostArena
from spmdrl.memory.mover import Ticket

WINDOW_BYTES = 512 << 20
"""Size of a window: at the bus's rate its copy takes over a hundred times what it takes to start
it and to wait for it."""

NUM_WINDOWS = 2
"""Windows that have a place on the device at once."""

_ALIGNED = ALIGNMENT // 4
"""Float32 numbers to which runs are aligned on the device, for kernels that load many at once."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """A range of one group of tensors, while it is on the device.

    Args:
        group: index of the group.
        start, stop: its elements in the flattened tensors.
        here: `[stop - start]` float32 of each tensor of the group; what is written there goes home.
    """

    group: int
    start: int
    stop: int
    here: tuple[Tensor, ...]


Direction = Literal["to_host", "to_device"]

Span = tuple[int, int, int]
"""(group, start, stop) of a range."""


def staged_bytes(num_bytes: int) -> int:
    """Bytes on the device, about, while a state of `num_bytes` passes through it."""
    return min(num_bytes, NUM_WINDOWS * WINDOW_BYTES)


class Meter(Protocol):
    """Counts copies between host and device."""

    def copied(self, direction: Direction, ticket: Ticket) -> None: ...


class HostState:
    """Tensors on the host, page-locked where the device is a GPU.

    Args:
        device: where they are computed with.
        window_bytes: size of a window; by default `WINDOW_BYTES`.
        meter: counts the copies.
    """

    def __init__(
        self, device: torch.device, window_bytes: int | None = None, meter: Meter | None = None
    ) -> None:
        self._device, self._meter = device, meter
        self._capacity = (WINDOW_BYTES if window_bytes is None else window_bytes) // 4
        self._num_bytes = 0
        self._arenas: list[HostArena] = []
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            coming, going = (torch.cuda.Stream(device) for _ in "io")  # type: ignore[no-untyped-call]
            self._streams = coming, going

    def hold(self, like: Tensor) -> Tensor:
        """Make a float32 tensor of 0 on the host, of the same shape.

        Raises:
            ValueError: the host refuses so much memory, or to pin it.
        """
        shape = tuple(like.shape)
        size = 4 * math.prod(shape)
        if size == 0:
            return torch.zeros(shape)
        purpose = f"an optimizer's state, in addition to {self._num_bytes / 1e9:.2f} GB of it"
        arena = HostArena(size, pinned=self._streams is not None, purpose=purpose)
        self._num_bytes += size
        self._arenas.append(arena)
        return arena.bytes.view(torch.float32).view(shape)

    def passing(self, groups: Sequence[tuple[Tensor, ...]]) -> Iterator[list[Range]]:
        """Bring the groups' tensors window by window; after each, what was written goes home.

        The caller computes on the current stream between two windows. When the last one is done,
        the host has all of it.

        Args:
            groups: tensors of `hold`; those of a group have one shape.
        """
        windows = spans([(group[0].numel(), len(group)) for group in groups], self._capacity)
        size = max((_floats(window, groups) for window in windows), default=0)
        places = [
            torch.empty(size, dtype=torch.float32, device=self._device)
            for _ in range(min(NUM_WINDOWS, len(windows)))
        ]
        lanes = _Lanes(self._device, self._streams, len(places))
        try:
            for number, window in enumerate(windows):
                place = number % len(places)
                ranges = _ranges(places[place], window, groups)
                with lanes.bringing(place):
                    _copy(ranges, groups, home=False)
                yield ranges
                with lanes.sending(place):
                    _copy(ranges, groups, home=True)
        finally:  # also after an error: copies must not outlive their places
            lanes.join()
        if self._meter is not None:
            moved = sum(4 * len(group) * group[0].numel() for group in groups)
            for direction, ticket in lanes.tickets(moved).items():
                self._meter.copied(direction, ticket)


def spans(sizes: Sequence[tuple[int, int]], capacity: int) -> list[list[Span]]:
    """Cut groups into windows, in their order.

    Args:
        sizes: elements of each of a group's tensors, and their number.
        capacity: float32 numbers of a window; one range has at least `ALIGNMENT` bytes a tensor.
    """
    windows: list[list[Span]] = []
    room = 0
    for group, (size, count) in enumerate(sizes):
        start = 0
        while start < size:
            fits = room // count // _ALIGNED * _ALIGNED
            if fits == 0:
                windows.append([])
                room = max(capacity, count * _ALIGNED)
                continue
            stop = min(size, start + fits)
            windows[-1].append((group, start, stop))
            room -= count * _aligned(stop - start)
            start = stop
    return windows


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _floats(window: Sequence[Span], groups: Sequence[tuple[Tensor, ...]]) -> int:
    return sum(len(groups[group]) * _aligned(stop - start) for group, start, stop in window)


def _ranges(
    place: Tensor, window: Sequence[Span], groups: Sequence[tuple[Tensor, ...]]
) -> list[Range]:
    ranges, at = [], 0
    for group, start, stop in window:
        here = []
        for _ in groups[group]:
            here.append(place[at : at + stop - start])
            at += _aligned(stop - start)
        ranges.append(Range(group=group, start=start, stop=stop, here=tuple(here)))
    return ranges


def _copy(ranges: Sequence[Range], groups: Sequence[tuple[Tensor, ...]], *, home: bool) -> None:
    for one in ranges:
        for here, whole in zip(one.here, groups[one.group], strict=True):
            there = whole.view(-1)[one.start : one.stop]
            target, source = (there, here) if home else (here, there)
            target.copy_(source, non_blocking=True)


class _Lanes:
    """The order of copies and computation on a GPU's streams; on a CPU all of it runs in turn.

    Args:
        streams: for copies in and out; None on a CPU.
    """

    def __init__(
        self,
        device: torch.device,
        streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None,
        num_places: int,
    ) -> None:
        self._device, self._streams = device, streams
        self._began = time.perf_counter()
        self._timed: dict[Direction, list[torch.cuda.Event]] = {"to_device": [], "to_host": []}
        self._gone: list[torch.cuda.Event | None] = [None] * num_places
        if streams is not None:
            # kernels of the places' former owners may still run
            streams[0].wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def bringing(self, place: int) -> Iterator[None]:
        """Copy in, once the place's last window has gone; what follows is computed after it."""
        if self._streams is None:
            yield
            return
        coming = self._streams[0]
        if (gone := self._gone[place]) is not None:
            coming.wait_event(gone)
        with torch.cuda.stream(coming), self._timing("to_device", coming):
            yield
        torch.cuda.current_stream(self._device).wait_stream(coming)

    @contextmanager
    def sending(self, place: int) -> Iterator[None]:
        """Copy out, after what was computed until now."""
        if self._streams is None:
            yield
            return
        going = self._streams[1]
        going.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(going), self._timing("to_host", going):
            yield
        self._gone[place] = going.record_event()

    def join(self) -> None:
        """Wait, on the host, until all of it is home."""
        for stream in self._streams or ():
            stream.synchronize()

    def tickets(self, num_bytes: int) -> dict[Direction, Ticket]:
        """Return the copies of each direction as one, after `join`: `num_bytes` from its first
        copy's start to its last one's end.
        """
        seconds = time.perf_counter() - self._began
        return {
            direction: Ticket(
                num_bytes=num_bytes,
                host_seconds=seconds / 2,
                events=(events[0], events[-1]) if events else None,
            )
            for direction, events in self._timed.items()
        }

    @contextmanager
    def _timing(self, direction: Direction, stream: torch.cuda.Stream) -> Iterator[None]:
        timed = self._timed[direction]
        if not timed:
            timed.append(stream.record_event(_timed_event()))
        yield
        timed[1:] = [stream.record_event(_timed_event())]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
