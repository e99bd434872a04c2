"""Tensors in safetensors files: their headers, and their values, mapped when they are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spmdrl.models.fields import refuse_pointer

PLAIN: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The dtypes whose values can be used directly; others need scales, or are not weights."""

_DTYPES: Mapping[str, torch.dtype] = {
    **PLAIN,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
"""The dtypes of which tensors can be mapped."""


class Entry(Protocol):
    """A tensor of a model's directory, read box by box.

    `dtype` is that of the values read, in safetensors' spelling; `file` is named in errors.
    """

    @property
    def file(self) -> Path: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, box: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a file: its dtype in safetensors' spelling, its first byte, its size in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def map(self) -> Tensor:
        """Map the tensor: its values are read only when used (copied if they are misaligned)."""
        raw = np.memmap(self.file, np.uint8, mode="c", offset=self.begin, shape=(self.size,))
        dtype = _DTYPES[self.dtype]
        # a writer may place values without the alignment that their dtype needs in memory
        values = torch.from_numpy(raw if self.begin % dtype.itemsize == 0 else np.array(raw))
        return values.view(dtype).view(self.shape)

    def read(self, box: tuple[slice, ...]) -> Tensor:
        """Return the values of a box."""
        return self.map()[box]


def dtype_error(dtype: str) -> str:
    """Make the error message about a tensor whose values cannot be used directly."""
    return (
        f"has dtype {dtype}, which is not one of {', '.join(PLAIN)}: its scales or its "
        "quantization_config are missing, or the format is not read; give the directory of the "
        "model in float weights"
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: its tensors by name.

    Raises:
        ValueError: it is not such a file, or damaged, or shorter than its header says.
    """
    refuse_pointer(file)
    try:
        # checks that the tensors fill the file without gaps
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is no readable safetensors file: {error}") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    entries = {}
    for name, held in header.items():
        if name != "__metadata__":
            start, stop = held["data_offsets"]
            entries[name] = StoredTensor(
                file=file,
                dtype=held["dtype"],
                shape=tuple(held["shape"]),
                begin=8 + length + start,
                size=stop - start,
            )
    return entries
