"""What lies where in a checkpoint.

A checkpoint is a directory `step_NNNNNNNN` with one safetensors file per rank and
`checkpoint.json`: the state, size and checksum of every file, and an index of (tensor, slice) ->
file. Tensors are kept as slices of global tensors, so a checkpoint loads on other ranks and
layouts. What belongs to one rank alone (`private/...` in its file) does not stand in the index.
Reading it executes nothing: the files are JSON and safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import local_box

Tensors = Mapping[str, tuple[Tensor, tuple[Slice, ...]]]
"""`group/local name` -> local tensor and its slices; the group keeps equal names apart."""

FORMAT = 4
INDEX = "checkpoint.json"
LATEST = "latest"
PRIVATE = "private/"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one slice of `group`'s global tensor lies."""

    group: str
    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    file: str
    key: str

    @property
    def piece(self) -> Slice:
        return Slice(name=self.name, shape=self.shape, start=self.start, stop=self.stop, offset=0)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """By what a file is known to be whole.

    Args:
        xxh3: XXH3 of 64 bits, in hexadecimal (https://xxhash.com): CRC-32 takes four times as long.
    """

    num_bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """Args:
    state: JSON values.
    files: by name, in rank order.
    """

    step: int
    state: Mapping[str, Any]
    files: Mapping[str, Mark]
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        content = {
            "format": FORMAT,
            "step": self.step,
            "state": self.state,
            "files": {name: asdict(mark) for name, mark in self.files.items()},
            "entries": [asdict(entry) for entry in self.entries],
        }
        return json.dumps(content)


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def entries_of(owned: Tensors, file: str) -> tuple[tuple[Entry, ...], dict[str, Tensor]]:
    """What a rank writes: entries of the index, and the tensors by their keys in the file."""
    entries, boxes = [], {}
    for full_name, (tensor, slices) in owned.items():
        for piece in slices:
            key = f"{full_name}#{piece.offset}"
            boxes[key] = local_box(tensor, piece)
            entries.append(
                Entry(
                    group=full_name.split("/", 1)[0],
                    name=piece.name,
                    shape=piece.shape,
                    start=piece.start,
                    stop=piece.stop,
                    file=file,
                    key=key,
                )
            )
    return tuple(entries), boxes


def read_index(path: Path) -> Index:
    """The index of the checkpoint `path`.

    Raises:
        ValueError: it is damaged or of another format.
    """
    try:
        content = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / INDEX} cannot be read ({error}); {mend(path)}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path / INDEX} is not a checkpoint index of format {FORMAT}: resume with the spmdrl "
            f"that wrote it, or {mend(path)}"
        )
    try:
        return Index(
            step=content["step"],
            state=content["state"],
            files={name: Mark(**mark) for name, mark in content["files"].items()},
            entries=tuple(_entry(raw) for raw in content["entries"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / INDEX} is damaged ({error!r}); {mend(path)}") from None


def _entry(raw: Mapping[str, Any]) -> Entry:
    return Entry(
        group=raw["group"],
        name=raw["name"],
        shape=tuple(raw["shape"]),
        start=tuple(raw["start"]),
        stop=tuple(raw["stop"]),
        file=raw["file"],
        key=raw["key"],
    )


def mend(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"write the name of an older checkpoint into {path.parent / LATEST}"
