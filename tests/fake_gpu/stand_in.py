"""Python's side of the stand-in device: counts, memory, marks in the trace."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


def is_active() -> bool:
    """Whether this process runs on the stand-in device (`run.sh`)."""
    return "FAKE_GPU_BUILD" in os.environ


def has_values() -> bool:
    """Whether operations are computed; else launches, memory and copies are only counted."""
    return os.environ.get("FAKE_GPU_VALUES", "1") != "0"


@cache
def library() -> ctypes.CDLL:
    """The stand-in runtime, which `run.sh` has loaded before everything else."""
    assert is_active(), "run tests/fake_gpu/run.sh"
    runtime = ctypes.CDLL("libcudart.so.13")
    address, size = ctypes.c_void_p, ctypes.c_size_t
    runtime.fake_kind.restype = ctypes.c_char_p
    runtime.fake_launch.argtypes = [ctypes.c_int, address, ctypes.c_char_p, size]
    runtime.fake_mark.argtypes = [ctypes.c_char_p]
    runtime.fake_host_address.argtypes, runtime.fake_host_address.restype = [address, size], address
    for name in ("fake_address_base", "fake_host_base"):
        getattr(runtime, name).restype = address
    for name in ("fake_address_space", "fake_used", "fake_peak"):
        getattr(runtime, name).restype = size
    runtime.fake_label.argtypes = [ctypes.c_char_p]
    touch = [address, size, ctypes.c_int, ctypes.c_char_p]
    runtime.fake_touch.argtypes, runtime.fake_touch.restype = [address, *touch], ctypes.c_char_p
    runtime.fake_touch_by_host.argtypes = touch
    runtime.fake_touch_by_host.restype = ctypes.c_char_p
    runtime.fake_is_capturing.argtypes = [address]
    runtime.fake_capture.argtypes = [address] * 4
    return runtime


@cache
def kinds() -> tuple[str, ...]:
    """Names of what is counted, in the runtime's order."""
    found = []
    while name := library().fake_kind(len(found)):
        found.append(name.decode())
    return tuple(found)


def counts() -> dict[str, int]:
    """Numbers of calls by kind since the process began, and bytes as `KIND_bytes`."""
    numbers, sizes = ((ctypes.c_long * len(kinds()))() for _ in range(2))
    library().fake_counts(numbers, sizes)
    found = dict(zip(kinds(), numbers, strict=True))
    return found | {f"{kind}_bytes": n for kind, n in zip(kinds(), sizes, strict=True) if n}


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Fill the yielded dictionary with the counts of the block, without zeros."""
    before, found = counts(), dict[str, int]()
    yield found
    after = counts()
    found |= {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)}


def used_bytes() -> int:
    """Bytes of the device that are allocated, in whole pages, by every allocator."""
    return int(library().fake_used())


def peak_bytes() -> int:
    """Largest `used_bytes` since the process began or `reset_peak` was called."""
    return int(library().fake_peak())


def reset_peak() -> None:
    library().fake_reset_peak()


def mark(text: str) -> None:
    """Write a line into the trace."""
    library().fake_mark(text.encode())
