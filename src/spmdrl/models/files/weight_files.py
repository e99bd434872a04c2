"""The safetensors files of a directory: their tensors, and slices of these.

The headers are read once, when the directory is opened. A tensor's bytes are mapped only while a
slice of it is read, so that a read costs the same in files with many tensors and with few.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spmdrl.models.fields import Fields, read_json, refuse_pointer
from spmdrl.models.sharding import Slice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

PLAIN: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The dtypes whose values can be used directly; others need scales, or are not weights."""


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
        dtype = PLAIN[self.dtype]
        # a writer may place values without the alignment that their dtype needs in memory
        values = torch.from_numpy(raw if self.begin % dtype.itemsize == 0 else np.array(raw))
        return values.view(dtype).view(self.shape)


class Checkpoint:
    """The weights of a directory.

    Args:
        notes: oddities of the directory's files that make no tensor doubtful.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, StoredTensor], notes: tuple[str, ...] = ()
    ) -> None:
        self.path, self.entries, self.notes = path, entries, notes

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, part: Slice) -> Tensor:
        """Read the values of `part` and check that they are finite.

        Raises:
            ValueError: the tensor is missing, has another shape or a dtype that is not `PLAIN`, or
                a value of the slice is NaN or infinite; the message names file and tensor.
        """
        entry = self._entry(part.name)
        if entry.shape != part.shape:
            raise ValueError(
                f"{entry.file}: tensor {part.name!r} has shape {entry.shape}, "
                f"config.json asks for {part.shape}"
            )
        if entry.dtype not in PLAIN:
            raise ValueError(f"{entry.file}: tensor {part.name!r} {dtype_error(entry.dtype)}")
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        values = entry.map()[box]
        # one pass without a copy: the extremes are not finite if any value is not
        if not all(extreme.float().isfinite() for extreme in values.aminmax()):
            index = (~values.float().isfinite()).nonzero()[0].tolist()
            place = [i + a for i, a in zip(index, part.start, strict=True)]
            raise ValueError(
                f"{entry.file}: tensor {part.name!r} has {values[tuple(index)].item()} at {place}: "
                "the weights were damaged before they were saved"
            )
        return values

    def _entry(self, name: str) -> StoredTensor:
        if name not in self.entries:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self.entries[name]


def dtype_error(dtype: str) -> str:
    """Make the error message about a tensor whose values cannot be used directly."""
    return (
        f"has dtype {dtype}, which is not one of {', '.join(PLAIN)}: quantised weights are not "
        "read; give the directory of the model in float weights"
    )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the weights of a Hugging Face directory: one safetensors file, or several and an index.

    Raises:
        ValueError: there are no weights, files contradict each other, or one is missing or damaged.
    """
    directory = Path(path)
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        return _open_sharded(directory)
    if not single.is_file():
        raise ValueError(
            f"{directory} has neither {SINGLE} nor {INDEX}: give the directory of a Hugging Face "
            "model with safetensors weights (`spmdrl convert` makes one of a GGUF file)"
        )
    return Checkpoint(directory, read_header(single), _unread(directory, [single]))


def _open_sharded(directory: Path) -> Checkpoint:
    index, single = directory / INDEX, directory / SINGLE
    files = {name: directory / file for name, file in _weight_map(index).items()}
    found = sorted(set(files.values()))
    if single.is_file() and found != [single]:
        raise ValueError(
            f"{directory} has both {SINGLE} and {INDEX}, which names other files: they may hold "
            "different weights; remove what is older"
        )
    entries: dict[str, StoredTensor] = {}
    for file in found:
        if not file.is_file():
            name = min(name for name, other in files.items() if other == file)
            raise ValueError(f"{file} is missing, {index} says that it holds {name!r}")
        header = read_header(file)
        twice = sorted(header.keys() & entries.keys())
        if twice:
            raise ValueError(
                f"{file} and {entries[twice[0]].file} both hold the tensor {twice[0]!r}"
            )
        entries |= header
    for name, file in files.items():
        if name not in entries or entries[name].file != file:
            raise ValueError(f"{file} has no tensor {name!r}, {index} says that it holds it")
    extra = sorted(entries.keys() - files.keys())
    notes = _unread(directory, found)
    if extra:
        notes = (f"{index} does not name {extra[0]!r}{_more(extra)}, which a file holds", *notes)
    return Checkpoint(directory, entries, notes)


def _weight_map(index: Path) -> dict[str, str]:
    fields = Fields(values=read_json(index), origin=str(index))
    weight_map = fields.section("weight_map")
    if not weight_map:
        raise fields.wrong("weight_map", "an object that names a file for each tensor")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{index}: weight_map has {file!r} for {name!r}, which is no file name"
            )
    return dict(weight_map)


def _unread(directory: Path, read: list[Path]) -> tuple[str, ...]:
    """Make a note on files named like weights that are not read: they may be of an older save."""
    others = sorted(str(f.name) for f in directory.glob("model*.safetensors") if f not in read)
    return (f"{directory}: {others[0]}{_more(others)} is not read",) if others else ()


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


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
