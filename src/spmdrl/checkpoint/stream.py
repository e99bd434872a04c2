"""Writing a safetensors file tensor by tensor, so that no second copy of all of them is made.

The format: 8 bytes with the header's length, little endian; the header, JSON that gives every
tensor's dtype, shape and place; the values (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

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
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_CHUNK = 1 << 22
_SYNCED = 1 << 28
"""Bytes after which the file is made to reach the disk: the last fsync then has little to do, and
its progress is seen."""


@torch.no_grad()
def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], progress: Callable[[], None] = lambda: None
) -> Mark:
    """Write and fsync the file; its size and checksum. At most one tensor at a time is on the host.

    Args:
        progress: called after every part that is on the disk, and more often.

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
