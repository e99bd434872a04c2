"""Conversion of `pytorch_model.bin` to safetensors, without running code from the pickle."""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmdrl.atomic_files import atomic_directory
from spmdrl.models.fields import read_json, refuse_pointer
from spmdrl.models.files.export import MAX_SHARD_BYTES, MORE_TEMPLATES, write_weights
from spmdrl.models.files.safetensors_writer import DTYPES
from spmdrl.models.files.weight_files import CONFIG, INDEX, PICKLES, SINGLE, weight_map

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"

_LEFT = (".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".safetensors")
"""Ends of the names of files that are not copied: weights in this format and others."""


def has_pickles(directory: str | Path) -> bool:
    """Whether a directory has its weights in pickles, and none in safetensors files."""
    path = Path(directory)
    is_safe = any((path / name).is_file() for name in (SINGLE, INDEX))
    return not is_safe and any((path / name).is_file() for name in PICKLES)


def convert_pickles(source: str | Path, out_dir: str | Path) -> None:
    """Write a directory with the same tensors in safetensors files, and the same other files.

    Files are mapped and written tensor by tensor. Only tensors are unpickled. Names that share a
    storage are written one by one, but for a head that is tied to the embedding, which files of
    tied models leave out.

    Raises:
        ValueError: `out_dir` is `source`; a file is missing, is no pickle of tensors, or does not
            hold what the index says.
        OSError: `out_dir` could not be written.
    """
    path = Path(source)
    if Path(out_dir).resolve() == path.resolve():
        raise ValueError(f"{out_dir} is read for the conversion: give another directory to write")
    files = _files(path)
    tied = bool(read_json(path / CONFIG).get("tie_word_embeddings", False))
    shapes = {
        name: tuple(tensor.shape)
        for file, names in files.items()
        for name, tensor in _load(file, names, tied).items()
    }
    with atomic_directory(out_dir) as fresh:
        write_weights(_tensors(files, tied), shapes, fresh, MAX_SHARD_BYTES)
        for other in sorted(path.iterdir()):
            if other.is_file() and not other.name.endswith(_LEFT):
                shutil.copyfile(other, fresh / other.name)
        if (path / MORE_TEMPLATES).is_dir():
            shutil.copytree(path / MORE_TEMPLATES, fresh / MORE_TEMPLATES)


def _files(path: Path) -> dict[Path, frozenset[str] | None]:
    """Find the pickles, with the tensors that the index gives each; None: all that it has.

    A single file counts before an index, as in transformers.
    """
    single, index = (path / name for name in PICKLES)
    if single.is_file():
        return {single: None}
    names: dict[Path, set[str]] = {}
    for name, own in weight_map(index).items():
        names.setdefault(path / own, set()).add(name)
    for file, held in names.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing, {index} says that it holds {min(held)!r}")
    return {file: frozenset(held) for file, held in sorted(names.items())}


def _tensors(
    files: Mapping[Path, frozenset[str] | None], tied: bool
) -> Iterator[tuple[str, Tensor]]:
    for file, names in files.items():
        yield from _load(file, names, tied).items()


def _load(file: Path, names: frozenset[str] | None, tied: bool) -> dict[str, Tensor]:
    """Load a pickle's tensors; those of a file in the zip format are mapped, not read."""
    refuse_pointer(file)
    try:
        # weights_only refuses every pickle that would run code
        content: Any = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # torch's text advises to load the file unsafely
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {found[1]}" if found else type(error).__name__
        raise ValueError(f"{file} is no readable pickle of tensors alone: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds {type(content).__name__}, not tensors by name")
    tensors: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file} holds {name!r}, which is no tensor")
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise ValueError(f"{file}: tensor {name!r} ({tensor.dtype}) fits no safetensors file")
        tensors[name] = tensor
    if names is not None and names != tensors.keys():
        name = min(names ^ tensors.keys())
        says = "does not hold" if name in names else "holds, and the index does not name,"
        raise ValueError(f"{file} {says} the tensor {name!r}: the index is of other files")
    embedding = next((t for n, t in tensors.items() if n.endswith(_EMBEDDING)), None)
    head = tensors.get(_HEAD)
    if tied and head is not None and embedding is not None and _is_same(head, embedding):
        del tensors[_HEAD]
    return tensors


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of one storage."""
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
    )
