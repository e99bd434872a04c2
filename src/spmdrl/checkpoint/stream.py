"""Writing a safetensors file tensor by tensor, so that no second copy of all of them is made.

The format: 8 bytes with the header's length, little endian; the header, JSON that gives every
tensor's dtype, shape and place; the values (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}


@torch.no_grad()
def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write and fsync the file; its size in bytes. At most one tensor at a time is on the host.

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
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            values = tensor.detach().cpu().contiguous().flatten()
            file.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + position
