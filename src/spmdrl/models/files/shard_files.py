"""Safetensors files of a Hugging Face directory, written while their tensors arrive.

The format (https://github.com/huggingface/safetensors#format) is 8 bytes with the header's length,
little endian; the header, JSON with every tensor's dtype, shape and place, padded with spaces; and
the values. The header comes first but is known last, so room is left for it.
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

Shape = tuple[int, ...]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_LARGEST = 10**15
"""Upper bound of the place where a tensor begins in a file."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Summary of the files written by `write_shards`.

    Args:
        names: names of each file's tensors; file `i` is `{i}.part`.
        num_bytes: bytes of all values.
        dtype: dtype of the last tensor, as written in config.json.
    """

    names: tuple[tuple[str, ...], ...]
    num_bytes: int
    dtype: str


@torch.no_grad()
def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
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
    dtype = "float32"
    with ExitStack() as opened:
        for name, tensor in tensors:
            if not files or not files[-1].has_room(tensor, max_bytes):
                for full in files[-1:]:
                    full.finish()
                file = opened.enter_context((directory / f"{len(files)}.part").open("wb"))
                files.append(_File(file, waiting))
            files[-1].write(name, tensor)
            del waiting[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
        for last in files[-1:]:
            last.finish()
    return Shards(
        names=tuple(tuple(file.names) for file in files),
        num_bytes=sum(file.num_bytes for file in files),
        dtype=dtype,
    )


class _File:
    """A file that grows tensor by tensor.

    Args:
        file: an empty file that is open for writing.
        shapes: shapes of all tensors that may come.
    """

    def __init__(self, file: BufferedWriter, shapes: Mapping[str, Shape]) -> None:
        longest = {name: _entry("BF16", shape, _LARGEST, 0) for name, shape in shapes.items()}
        self._room = -(-len(_header(longest)) // 8) * 8
        self._entries: dict[str, dict[str, object]] = {}
        self._file = file
        self._file.seek(8 + self._room)
        self.num_bytes = 0
        """Bytes of the values so far."""

    @property
    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def has_room(self, tensor: Tensor, max_bytes: int) -> bool:
        """Whether `tensor` may come next: values must be aligned for their dtype, without gaps."""
        fits = self.num_bytes + tensor.numel() * tensor.element_size() <= max_bytes
        return self.num_bytes == 0 or (fits and self.num_bytes % tensor.element_size() == 0)

    def write(self, name: str, tensor: Tensor) -> None:
        values = tensor.detach().cpu().contiguous().flatten()
        size = values.numel() * values.element_size()
        dtype = _DTYPES[tensor.dtype]
        self._entries[name] = _entry(dtype, tuple(tensor.shape), self.num_bytes, size)
        self._file.write(values.view(torch.uint8).numpy().data)
        self.num_bytes += size

    def finish(self) -> None:
        """Write the header, which completes the safetensors file."""
        header = _header(self._entries).ljust(self._room)
        assert len(header) == self._room, (len(header), self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header)
        self._file.close()


def _entry(dtype: str, shape: Shape, start: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}


def _header(entries: Mapping[str, object]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
