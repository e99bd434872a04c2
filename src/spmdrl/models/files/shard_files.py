"""Safetensors files of a Hugging Face directory, written while their tensors arrive.

The header comes first but is known last, so room is left for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.files.safetensors_writer import SafetensorsWriter, values_of


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
