"""Writing of a checkpoint's safetensors file, without a second copy of all tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from spmdrl.checkpoint.direct import DirectFile
from spmdrl.checkpoint.index import Mark
from spmdrl.models.files.safetensors_writer import DTYPES, SafetensorsWriter, values_of

_CHUNK = 1 << 22
_SYNCED = 1 << 28
"""Bytes after which the file is synced to the disk: the last fsync then has little to do, and
progress is visible."""


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the tensor, if one cannot be stored in a safetensors file."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}: a checkpoint keeps tensors")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(
                f"{name} is a {tensor.layout} tensor on {tensor.device}: a checkpoint keeps dense "
                "tensors with values"
            )
        if tensor.dtype not in DTYPES:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
            raise ValueError(f"{name} is {tensor.dtype}: a checkpoint keeps {known}")


@torch.no_grad()
def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], progress: Callable[[], None] = lambda: None
) -> Mark:
    """Write and fsync the file; returns its size and checksum. The host holds one tensor at a time.

    Args:
        progress: called after every part, and at the end.

    Raises:
        OSError: the file could not be written whole.
    """
    writer = SafetensorsWriter({})
    # wide dtypes first, so that every tensor is aligned to its item size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        writer.describe(name, tensor)
    header = writer.header()
    checksum, unsynced = xxhash.xxh3_64(), 0
    with DirectFile(path) as file:
        for part in _parts(header, [tensor for _, tensor in ordered]):
            file.write(part)
            checksum.update(part)
            unsynced += len(part)
            if unsynced >= _SYNCED:
                file.sync()
                unsynced = 0
            progress()
    progress()
    return Mark(num_bytes=len(header) + writer.num_bytes, xxh3=checksum.hexdigest())


def _parts(header: bytes, tensors: list[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        data = values_of(tensor)
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]
