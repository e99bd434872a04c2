"""`Mover`: copies storages between the device and their host arena, and frees them.

On CUDA all copies run on one side stream, which waits for the work queued on the compute stream.
The host waits for a copy out before the storage is freed, so that the allocator can reuse the block
at once (`record_stream` would hold it back until an event is polled). Storages are allocated on
the compute stream, whose pool they return to. On the CPU the same calls are plain copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmdrl.memory.arena import ArenaLayout, Bucket, HostArena

STAGING_BYTES = 32 << 20
"""Size of the device's bucket for small storages, on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A copy that was started.

    Args:
        num_bytes: bytes that the copy moves.
        host_seconds: duration of the copy, if there are no events.
        events: (start, end) on the side stream.
    """

    num_bytes: int
    host_seconds: float = 0.0
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def is_done(self) -> bool:
        if self.events is None:
            return True
        return bool(self.events[1].query())  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Block the host until the copy is done."""
        if self.events is not None:
            self.events[1].synchronize()

    def seconds(self) -> float:
        """Duration of the copy without the waits before it; blocks until it is done."""
        if self.events is None:
            return self.host_seconds
        self.finish()
        start, end = self.events
        return float(start.elapsed_time(end)) / 1e3


class Mover:
    """Moves storages of one device.

    Args:
        staging_bytes: size of the bucket through which small storages move together, 0 for none.
            The default is 0 on the CPU, `STAGING_BYTES` on CUDA.
    """

    def __init__(self, device: torch.device, *, staging_bytes: int | None = None) -> None:
        self.device = device
        self.on_cuda = device.type == "cuda"
        if staging_bytes is None:
            staging_bytes = STAGING_BYTES if self.on_cuda else 0
        self.staging_bytes = staging_bytes
        self._staging: Tensor | None = None
        self._side: torch.cuda.Stream | None = None
        if self.on_cuda:
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(
        self, storages: Sequence[torch.UntypedStorage], layout: ArenaLayout, arena: HostArena
    ) -> Ticket:
        """Start copying the storages into the arena; they must stay until the ticket is done."""
        staging = self._staging_for(layout)

        def copy() -> None:
            for bucket in layout.buckets:
                here = staging[: bucket.stop - bucket.start]
                torch._foreach_copy_(_staged(here, layout, bucket), _inside(storages, bucket))
                arena.bytes[bucket.start : bucket.stop].copy_(here, non_blocking=True)
            for i in layout.singles:
                away = arena.bytes.narrow(0, layout.offsets[i], layout.sizes[i])
                away.copy_(_bytes_of(storages[i]), non_blocking=True)

        return self._run(copy, sum(layout.sizes))

    def to_device(
        self, storages: Sequence[torch.UntypedStorage], layout: ArenaLayout, arena: HostArena
    ) -> Ticket:
        """Start filling the allocated storages; call `let_compute_wait` before any use.

        They must not be freed before the ticket is done.
        """
        staging = self._staging_for(layout)

        def copy() -> None:
            for bucket in layout.buckets:
                here = staging[: bucket.stop - bucket.start]
                here.copy_(arena.bytes[bucket.start : bucket.stop], non_blocking=True)
                torch._foreach_copy_(_inside(storages, bucket), _staged(here, layout, bucket))
            for i in layout.singles:
                away = arena.bytes.narrow(0, layout.offsets[i], layout.sizes[i])
                _bytes_of(storages[i]).copy_(away, non_blocking=True)

        return self._run(copy, sum(layout.sizes))

    def let_compute_wait(self, ticket: Ticket) -> None:
        """Make all later work of the current stream run after the copy."""
        if ticket.events is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket.events[1])

    def _run(self, copy: Callable[[], None], num_bytes: int) -> Ticket:
        if self._side is None:
            began = time.perf_counter()
            copy()
            return Ticket(num_bytes=num_bytes, host_seconds=time.perf_counter() - began)
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Before a copy in, too: kernels of the blocks' former owner may still run.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            start.record()
            copy()
            end.record()
        return Ticket(num_bytes=num_bytes, events=(start, end))

    def _staging_for(self, layout: ArenaLayout) -> Tensor:
        """The bucket on the device, made once: on the side stream its copies follow each other."""
        if self._staging is None:
            size = self.staging_bytes if layout.buckets else 0
            staging = torch.empty(size, dtype=torch.uint8, device=self.device)
            if not layout.buckets:
                return staging
            self._staging = staging
        return self._staging


def allocate(storages: Sequence[torch.UntypedStorage], sizes: Sequence[int]) -> None:
    """Give freed storages `sizes` bytes each, with undefined content."""
    for storage, size in zip(storages, sizes, strict=True):
        assert storage.nbytes() == 0, (storage.nbytes(), size)
        storage.resize_(size)


def free(storages: Sequence[torch.UntypedStorage]) -> None:
    """Return the storages' memory to the allocator."""
    for storage in storages:
        storage.resize_(0)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """The storage as uint8 `[nbytes]`, a new tensor, so that no other tensor's version changes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _inside(storages: Sequence[torch.UntypedStorage], bucket: Bucket) -> list[Tensor]:
    return [_bytes_of(storage) for storage in storages[bucket.first : bucket.last]]


def _staged(staging: Tensor, layout: ArenaLayout, bucket: Bucket) -> list[Tensor]:
    """Views of the bucket's storages in the staging bucket, whose start is the bucket's."""
    return [
        staging.narrow(0, layout.offsets[i] - bucket.start, layout.sizes[i])
        for i in range(bucket.first, bucket.last)
    ]
