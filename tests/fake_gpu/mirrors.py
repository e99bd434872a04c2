"""CPU tensors over the stand-in device's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fake_gpu.races import extent
from fake_gpu.stand_in import library

PLAIN = (Tensor, torch.nn.Parameter)
"""Subclasses, as DTensor, are left to their own dispatch, which arrives here with plain tensors."""


def is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and type(value) in PLAIN and value.is_cuda


class Mirrors:
    """CPU tensors over the stand-in device's memory."""

    def __init__(self) -> None:
        runtime = library()
        self._base: int = runtime.fake_address_base()
        size = runtime.fake_address_space()
        whole = (ctypes.c_uint8 * size).from_address(runtime.fake_host_base())
        self._bytes = torch.frombuffer(whole, dtype=torch.uint8)
        self._typed: dict[torch.dtype, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return the same elements as a CPU tensor.

        Raises:
            RuntimeError: the storage was freed (`resize_(0)`), or its memory is not allocated.
        """
        dtype, address = tensor.dtype, tensor.data_ptr()
        if tensor.numel() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype)
        whole = self._typed.get(dtype)
        if whole is None:
            whole = self._typed[dtype] = self._bytes.view(dtype)
        if not library().fake_host_address(address, extent(tensor)):
            raise RuntimeError(freed(tensor.shape))
        offset = (address - self._base) // dtype.itemsize
        return whole.as_strided(tensor.shape, tensor.stride(), offset)


def freed(shape: Sequence[int]) -> str:
    return f"freed or unmapped device memory is used: a tensor of {tuple(shape)}"


@cache
def mirrors() -> Mirrors:
    return Mirrors()


@dataclass(frozen=True, kw_only=True)
class Span:
    """Device memory of a tensor, by address: a graph holds no storage."""

    address: int
    size: int
    shape: tuple[int, ...]

    def check(self, name: str) -> None:
        if self.size and not library().fake_host_address(self.address, self.size):
            raise RuntimeError(f"{name}: {freed(self.shape)}")


def span_of(tensor: Tensor) -> Span:
    return Span(address=tensor.data_ptr(), size=extent(tensor), shape=tuple(tensor.shape))
