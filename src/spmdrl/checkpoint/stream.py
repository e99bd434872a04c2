"""Writing of a safetensors file tensor by tensor, without a second copy of all tensors.

The format: 8 bytes with the header's length, little endian; the header, JSON with every tensor's
dtype, shape and place; the values (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from spmdrl.checkpoint.direct import DirectFile
from spmdrl.checkpoint.index import Mark

_DTYPES = {
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
        if tensor.dtype not in _DTYPES:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _DTYPES))
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
    header, position = {}, 0
    # wide dtypes first, so that every tensor is aligned to its item size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        stop = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksum, unsynced = xxhash.xxh3_64(), 0
    with DirectFile(path) as file:
        for part in _parts(text, [tensor for _, tensor in ordered]):
            file.write(part)
            checksum.update(part)
            unsynced += len(part)
            if unsynced >= _SYNCED:
                file.sync()
                unsynced = 0
            progress()
    progress()
    return Mark(num_bytes=8 + len(text) + position, xxh3=checksum.hexdigest())


def _parts(header: bytes, tensors: list[Tensor]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().flatten()
        data = memoryview(values.view(torch.uint8).numpy().data)
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]
