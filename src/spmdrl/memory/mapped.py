"""`MappedMemory`: memory of a GPU that leaves and comes back at one address, by the virtual memory
of CUDA's driver (driver API, "Virtual Memory Management").

An address is reserved once; pages are made and mapped there while the memory is needed. So a CUDA
graph that has captured the address stays valid while others use the pages. Torch's allocator does
not know of this memory: where the driver has no pages left, it is asked for those that it caches.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from math import prod
from typing import Any

import torch
from torch import Tensor

from spmdrl.memory.arena import ALIGNMENT

_PINNED, _ON_DEVICE, _READ_AND_WRITE = 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, and of CUmemAccess_flags
CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""

_OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""

_REGION_BYTES = 64 << 20
"""Least bytes of a region of an arena."""

_Size, _Address = ctypes.c_size_t, ctypes.c_uint64


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp; the last fields are its allocFlags."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class _Driver:
    """The driver's calls, for one device.

    Raises:
        OSError: there is no driver.
        AttributeError: it is too old.
    """

    def __init__(self, index: int) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        pointer, number = ctypes.c_void_p, ctypes.c_ulonglong
        self.calls = {
            name: _typed(getattr(library, name), arguments)
            for name, arguments in {
                "cuMemGetAllocationGranularity": (pointer, pointer, ctypes.c_int),
                "cuMemAddressReserve": (pointer, _Size, _Size, _Address, number),
                "cuMemAddressFree": (_Address, _Size),
                "cuMemCreate": (pointer, _Size, pointer, number),
                "cuMemRelease": (number,),
                "cuMemMap": (_Address, _Size, _Size, number, number),
                "cuMemSetAccess": (_Address, _Size, pointer, _Size),
                "cuMemUnmap": (_Address, _Size),
            }.items()
        }
        place = _Location(_ON_DEVICE, index)
        self.properties = _Properties(type=_PINNED, location=place)
        self.access = _Access(place, _READ_AND_WRITE)

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            RuntimeError: it failed.
        """
        error = int(self.calls[name](*arguments))
        if error:
            raise RuntimeError(f"{name} of the CUDA driver failed (CUresult {error})")


def _typed(function: Any, arguments: tuple[Any, ...]) -> Any:
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function


class MappedMemory:
    """Bytes of a device at one address, mapped or not. Freed with the last tensor over it.

    Args:
        num_bytes: size; it is rounded up to whole pages (2 MiB).

    Raises:
        RuntimeError: the driver refuses; see `fault_of_mapping`.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        assert num_bytes > 0 and device.index is not None, (num_bytes, device)
        self._device, self._driver = device, _Driver(device.index)
        page = _Size()
        properties = ctypes.byref(self._driver.properties)
        self._driver("cuMemGetAllocationGranularity", ctypes.byref(page), properties, 0)
        self.num_bytes = -(-num_bytes // page.value) * page.value
        address = _Address()
        self._driver("cuMemAddressReserve", ctypes.byref(address), self.num_bytes, 0, 0, 0)
        self._address = address.value
        self._mapped = [False]
        self._free = weakref.finalize(
            self, _free, self._driver, self._address, self.num_bytes, self._mapped, device
        )
        self._free.atexit = False  # the end of the process frees, after CUDA is gone

    @property
    def is_mapped(self) -> bool:
        return self._mapped[0]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "version": 3,
        }

    def tensor(self) -> Tensor:
        """Return the memory, which is mapped now, as uint8 `[num_bytes]`: to be used only while it
        is mapped.
        """
        assert self.is_mapped
        return torch.as_tensor(self, device=self._device)

    def map(self) -> None:
        """Put fresh pages at the address, of any content.

        Raises:
            torch.OutOfMemoryError: the device has none.
        """
        assert not self.is_mapped
        handle = ctypes.c_ulonglong()
        properties = ctypes.byref(self._driver.properties)
        create = self._driver.calls["cuMemCreate"]
        error = int(create(ctypes.byref(handle), self.num_bytes, properties, 0))
        if error == _OUT_OF_MEMORY:
            torch.cuda.empty_cache()
            error = int(create(ctypes.byref(handle), self.num_bytes, properties, 0))
        if error:
            free, total = torch.cuda.mem_get_info(self._device)
            raise torch.OutOfMemoryError(
                f"CUDA out of memory: {self.num_bytes / 1e9:.2f} GB asked for (CUresult {error}), "
                f"{free / 1e9:.2f} of {total / 1e9:.2f} GB free"
            )
        driver = self._driver
        try:
            driver("cuMemMap", self._address, self.num_bytes, 0, handle, 0)
        finally:  # a mapping holds its pages
            driver("cuMemRelease", handle)
        self._mapped[0] = True
        access = ctypes.byref(driver.access)
        driver("cuMemSetAccess", self._address, self.num_bytes, access, 1)

    def unmap(self) -> None:
        """Give the pages back, after all work on the device; the address stays."""
        if self.is_mapped:
            torch.cuda.synchronize(self._device)
            self._driver("cuMemUnmap", self._address, self.num_bytes)
            self._mapped[0] = False


class MappedArena:
    """Memory of tensors that leave and come back together, at their addresses."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._regions: list[MappedMemory] = []
        self._rest = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def is_mapped(self) -> bool:
        return all(region.is_mapped for region in self._regions)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a tensor of any content. Small ones share regions, since pages are of 2 MiB."""
        num_bytes = prod(shape) * dtype.itemsize
        room = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if room > len(self._rest):
            region = MappedMemory(max(room, _REGION_BYTES), self._device)
            region.map()
            self._regions.append(region)
            fresh = region.tensor()
            if room > _REGION_BYTES // 2:
                return fresh[:num_bytes].view(dtype).view(shape)
            self._rest = fresh
        found, self._rest = self._rest[:num_bytes], self._rest[room:]
        return found.view(dtype).view(shape)

    def map(self) -> None:
        """Put fresh pages at all addresses.

        Raises:
            torch.OutOfMemoryError: the device has too few; none are then mapped.
        """
        try:
            for region in self._regions:
                region.map()
        except torch.OutOfMemoryError:
            self.unmap()
            raise

    def unmap(self) -> None:
        """Give all pages back, after all work on the device."""
        for region in self._regions:
            region.unmap()


def _free(
    driver: _Driver, address: int, num_bytes: int, mapped: list[bool], device: torch.device
) -> None:
    if mapped[0]:
        torch.cuda.synchronize(device)
        driver("cuMemUnmap", address, num_bytes)
    driver("cuMemAddressFree", address, num_bytes)


@functools.cache
def fault_of_mapping(device: torch.device) -> str | None:
    """Return why memory cannot be mapped on a GPU (by default the current one); None if it can.
    Drivers of some virtual machines cannot.
    """
    if device.type != "cuda":
        return "it is no GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        memory = MappedMemory(1, torch.device("cuda", index))
        for _ in range(2):
            memory.map()
            memory.unmap()
    except (OSError, AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None
