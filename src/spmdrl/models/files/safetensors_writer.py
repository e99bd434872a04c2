"""`SafetensorsWriter`: the header and the values of a safetensors file, tensor by tensor.

The format (https://github.com/huggingface/safetensors#format) is 8 bytes with the header's length,
little endian; the header, JSON with every tensor's dtype, shape and place, padded with spaces; and
the values.

Safetensors files of a Hugging Face directory, written while their tensors arrive.

The header comes first but is known last, so room is left for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

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

_LONGEST = max(DTYPES, key=lambda dtype: len(DTYPES[dtype]))
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
        """Bound the header's size if these tensors come, in any dtype."""
        longest = SafetensorsWriter({})
        longest._metadata, longest.num_bytes = self._metadata, _LARGEST
        for name, shape in shapes.items():
            longest.describe(name, torch.empty(shape, dtype=_LONGEST, device="meta"))
        return len(longest.header())


def values_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, copied only if not contiguous on the host."""
    values = tensor.detach().cpu().contiguous().flatten()
    return memoryview(values.view(torch.uint8).numpy().data)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Summary of the files written by `write_shards`.

    Args:
        names: names of each file's tensors; file `i` is `{i}.part`.
        num_bytes: bytes of all values.
        dtype: dtype of the largest tensor, as written in config.json.
    """

    names: tuple[tuple[str, ...], ...]
    num_bytes: int
    dtype: str


@torch.no_grad()
def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
    max_bytes: int,
) -> Shards:
    """Write files `0.part`, `1.part`, ... of at most `max_bytes` (or one tensor) each.

    No tensor is kept, and contiguous ones on the host are not copied.

    Args:
        tensors: names and tensors, each once, in any order, on any device.
        shapes: shapes of all of them, by name.

    Raises:
        OSError: a file could not be written.
    """
    files: list[_File] = []
    waiting = dict(shapes)
    dtype, largest = "float32", 0
    with ExitStack() as opened:
        for name, tensor in tensors:
            if not files or not files[-1].has_room(tensor, max_bytes):
                for full in files[-1:]:
                    full.finish()
                file = opened.enter_context((directory / f"{len(files)}.part").open("wb"))
                files.append(_File(file, waiting))
            files[-1].write(name, tensor)
            del waiting[name]
            if tensor.numel() > largest:
                dtype, largest = str(tensor.dtype).removeprefix("torch."), tensor.numel()
        for last in files[-1:]:
            last.finish()
    return Shards(
        names=tuple(file.writer.names for file in files),
        num_bytes=sum(file.writer.num_bytes for file in files),
        dtype=dtype,
    )


class _File:
    """A file that grows tensor by tensor.

    Args:
        file: an empty file that is open for writing.
        shapes: shapes of all tensors that may come.
    """

    def __init__(self, file: BufferedWriter, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.writer, self._file = SafetensorsWriter({"format": "pt"}), file
        self._room = self.writer.header_bytes(shapes)
        self._file.seek(self._room)

    def has_room(self, tensor: Tensor, max_bytes: int) -> bool:
        """Whether `tensor` may come next: values must be aligned for their dtype, without gaps."""
        used = self.writer.num_bytes
        fits = used + tensor.nbytes <= max_bytes
        return used == 0 or (fits and used % tensor.element_size() == 0)

    def write(self, name: str, tensor: Tensor) -> None:
        self.writer.describe(name, tensor)
        self._file.write(values_of(tensor))

    def finish(self) -> None:
        """Write the header, which completes the safetensors file."""
        self._file.seek(0)
        self._file.write(self.writer.header(self._room))
        self._file.close()
