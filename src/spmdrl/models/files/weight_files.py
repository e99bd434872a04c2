"""The safetensors files of a directory: the model's tensors in them, and slices of these.

The headers are read once, when the directory is opened. A tensor's bytes are mapped only while a
slice of it is read, so that a read costs the same in files with many tensors and with few.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from spmdrl.models.fields import Fields, read_json
from spmdrl.models.files.model_entries import model_entries
from spmdrl.models.files.stored_tensors import (
    PLAIN,
    Entry,
    StoredTensor,
    dtype_error,
    read_header,
)
from spmdrl.models.tensors import Slice

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Checkpoint:
    """The weights of a directory.

    Args:
        notes: oddities of the directory's files that make no tensor doubtful.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, Entry], notes: tuple[str, ...] = ()
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
        values = entry.read(box)
        # one pass without a copy: the extremes are not finite if any value is not
        if not all(extreme.float().isfinite() for extreme in values.aminmax()):
            index = (~values.float().isfinite()).nonzero()[0].tolist()
            place = [i + a for i, a in zip(index, part.start, strict=True)]
            raise ValueError(
                f"{entry.file}: tensor {part.name!r} has {values[tuple(index)].item()} at {place}: "
                "the weights were damaged before they were saved"
            )
        return values

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self.entries[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the weights of a Hugging Face directory: one safetensors file, or several and an index.

    Raises:
        ValueError: there are no weights, files contradict each other, or one is missing or damaged.
    """
    directory = Path(path)
    entries, notes = _stored(directory)
    config = directory / CONFIG
    if not config.is_file():
        return Checkpoint(directory, entries, notes)
    found, more = model_entries(entries, read_json(config), str(config))
    return Checkpoint(directory, found, (*notes, *more))


def _stored(directory: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Read the headers of a directory's files: tensors by their names there, and notes."""
    single = directory / SINGLE
    if (directory / INDEX).is_file():
        return _sharded(directory)
    if single.is_file():
        return read_header(single), _unread(directory, [single])
    pickle = next((name for name in PICKLES if (directory / name).is_file()), None)
    if pickle is not None:
        raise ValueError(
            f"{directory / pickle} is a pickle, which is not read; convert it once: "
            f"`spmdrl convert {directory} {directory.name}-safetensors`, and give that directory"
        )
    raise ValueError(
        f"{directory} has neither {SINGLE} nor {INDEX}: give the directory of a Hugging Face "
        "model with safetensors weights (`spmdrl convert` makes one of a GGUF file)"
    )


def _sharded(directory: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    index, single = directory / INDEX, directory / SINGLE
    files = {name: directory / file for name, file in weight_map(index).items()}
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
    return entries, notes


def weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensors' names with the names of the files that hold them.

    Raises:
        ValueError: it is damaged, or names a file of another directory.
    """
    fields = Fields(values=read_json(index), origin=str(index))
    files = fields.section("weight_map")
    if not files:
        raise fields.wrong("weight_map", "an object that names a file for each tensor")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{index}: weight_map has {file!r} for {name!r}, which is no file name"
            )
    return dict(files)


def _unread(directory: Path, read: list[Path]) -> tuple[str, ...]:
    """Make a note on files named like weights that are not read: they may be of an older save."""
    others = sorted(str(f.name) for f in directory.glob("model*.safetensors") if f not in read)
    return (f"{directory}: {others[0]}{_more(others)} is not read",) if others else ()


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
