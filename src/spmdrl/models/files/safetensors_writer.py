"""`SafetensorsWriter`: the header and the values of a safetensors file, tensor by tensor.

The format (https://github.com/huggingface/safetensors#format) is 8 bytes with the header's length,
little endian; the header, JSON with every tensor's dtype, shape and place, padded with spaces; and
the values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

_PREFIX = 8
_LARGEST = 10**15
"""Upper bound of the place where a tensor begins in a file."""


class SafetensorsWriter:
    """Describes the tensors of a file in the order of their values.

    Where all tensors are known first, the header is written first; otherwise `header_bytes` says
    how much room to leave for it.

    Args:
        metadata: texts for the header's `__metadata__`; empty: none.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = {"__metadata__": dict(metadata)} if metadata else {}
        self._entries: dict[str, object] = {}
        self.num_bytes = 0
        """Bytes of the values so far."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def describe(self, name: str, tensor: Tensor) -> None:
        """Give the tensor's values the place after those of the tensors before it."""
        start, self.num_bytes = self.num_bytes, self.num_bytes + tensor.nbytes
        self._entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self.num_bytes],
        }

    def header(self, num_bytes: int | None = None) -> bytes:
        """Return all bytes before the values, padded to `num_bytes` or to a multiple of 8."""
        text = json.dumps({**self._metadata, **self._entries}).encode()
        size = -(-len(text) // 8) * 8 if num_bytes is None else num_bytes - _PREFIX
        assert len(text) <= size, (len(text), size)
        return size.to_bytes(_PREFIX, "little") + text.ljust(size)

    def header_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Bound the header's size if these tensors come, in floats of 16 bits or more."""
        longest = SafetensorsWriter({})
        longest._metadata, longest.num_bytes = self._metadata, _LARGEST
        for name, shape in shapes.items():
            longest.describe(name, torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        return len(longest.header())


def values_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, copied only if not contiguous on the host."""
    values = tensor.detach().cpu().contiguous().flatten()
    return memoryview(values.view(torch.uint8).numpy().data)
