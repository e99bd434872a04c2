"""Host arenas: the bytes of a part while they are away from the device."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

SMALL_BYTES = 1 << 20
"""Storages below this size move together: a transfer of less does not fill the bus."""

ALIGNMENT = 512
"""Alignment of storages in an arena and in the staging bucket, as in the CUDA allocator."""

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Small storages `first` to `last - 1`, side by side in the arena.

    Args:
        start, stop: their bytes in the arena.
    """

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class ArenaLayout:
    """Positions of a part's storages in its arena.

    Args:
        sizes, offsets: size and offset of each storage, in bytes, in the given order.
        num_bytes: size of the arena.
        buckets: storages that move together.
        singles: storages that move individually.
    """

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    num_bytes: int
    buckets: tuple[Bucket, ...]
    singles: tuple[int, ...]


def layout_arena(sizes: Sequence[int], staging_bytes: int) -> ArenaLayout:
    """Lay storages of `sizes` bytes end to end in their order.

    Small neighbours form a bucket as long as it fits into `staging_bytes`; with 0 every storage
    moves individually.
    """
    room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    ends = [0, *accumulate(room)]
    buckets: list[Bucket] = []
    singles: list[int] = []
    for i, size in enumerate(sizes):
        if size >= SMALL_BYTES or room[i] > staging_bytes:
            singles.append(i)
        elif buckets and buckets[-1].last == i and ends[i + 1] - buckets[-1].start <= staging_bytes:
            first, start = buckets[-1].first, buckets[-1].start
            buckets[-1] = Bucket(first=first, last=i + 1, start=start, stop=ends[i + 1])
        else:
            buckets.append(Bucket(first=i, last=i + 1, start=ends[i], stop=ends[i + 1]))
    return ArenaLayout(
        sizes=tuple(sizes),
        offsets=tuple(ends[:-1]),
        num_bytes=ends[-1],
        buckets=tuple(buckets),
        singles=tuple(singles),
    )


class HostArena:
    """One allocation on the host, page-locked if `pinned`, freed with the object.

    The pages are mapped here and registered with CUDA, because torch's own allocator rounds pinned
    blocks up to the next power of two (pytorch/pytorch#150517), up to twice the memory.

    Args:
        purpose: what it is for, in errors.

    Raises:
        ValueError: the host refuses so much memory, or to pin it.
    """

    def __init__(self, num_bytes: int, *, pinned: bool, purpose: str = "a part of a role") -> None:
        assert num_bytes > 0, num_bytes
        try:
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ValueError(_refusal("map", num_bytes, purpose, error)) from error
        # In a forked child the pages would become copies under the device's transfers.
        pages.madvise(mmap.MADV_DONTFORK)
        with suppress(OSError):  # a kernel without huge pages
            # With huge pages the first copy into fresh pages and pinning take a third of the time.
            pages.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: Tensor = torch.frombuffer(pages, dtype=torch.uint8)
        if pinned:
            _pin(self.bytes, purpose)
            release = weakref.finalize(self, _unpin, self.bytes)
            release.atexit = False  # the end of the process unpins, after CUDA is gone


def _refusal(verb: str, num_bytes: int, purpose: str, why: object) -> str:
    return (
        f"the host cannot {verb} {num_bytes / 1e9:.2f} GB for {purpose} ({why}): give the job more "
        "host memory (--mem) or locked memory (ulimit -l), or set residency.NAME=keep of a part "
        "that has room on the device; spmdrl plan prints what a node's host needs"
    )


def _pin(memory: Tensor, purpose: str) -> None:  # [num_bytes] uint8
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
    if error != 0:
        raise ValueError(_refusal("pin", memory.nbytes, purpose, f"cudaError {error}"))


def _unpin(memory: Tensor) -> None:  # [num_bytes] uint8
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostUnregister(memory.data_ptr()))
    assert error == 0, (error, memory.nbytes)
