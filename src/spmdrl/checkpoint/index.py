"""The layout of a checkpoint.

A checkpoint is a directory `step_NNNNNNNN` with one safetensors file per rank and
`checkpoint.json`: the state, size and checksum of every file, and an index of (tensor, slice) ->
file. Tensors are stored as slices of global tensors, so a checkpoint loads on other ranks and
layouts. Tensors of only one rank (`private/...` in its file) are not in the index. Reading executes
nothing: the files are JSON and safetensors.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spmdrl.models.local_shards import local_box
from spmdrl.models.tensors import Slice

Tensors = Mapping[str, tuple[Tensor, tuple[Slice, ...]]]
"""`group/local name` -> local tensor and its slices; groups separate equal names."""

FORMAT = 4
INDEX = "checkpoint.json"
LATEST = "latest"
PRIVATE = "private/"
CHECKPOINTS = "checkpoints"
"""Key of the state that holds the names of the run's earlier checkpoints."""

_PART = 2000
"""Number of entries converted to JSON at a time, which takes some milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Location of one slice of `group`'s global tensor."""

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
    """Size and checksum of an intact file.

    Args:
        xxh3: 64-bit XXH3 in hexadecimal (https://xxhash.com); CRC-32 takes four times as long.
    """

    num_bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """Contents of a `checkpoint.json`.

    Args:
        written: time of writing, in seconds since 1970, or 0 if it is not recorded.
        state: JSON values.
        files: files by name, in rank order.
    """

    written: float
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, Mark]
    entries: tuple[Entry, ...]


def index_text(
    step: int,
    state: str,
    files: Mapping[str, Mark],
    entries: Sequence[Entry],
    progress: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Yield the index's JSON in parts: a large one takes seconds, and other threads must get turns.

    Args:
        state: the state's JSON.
        files: files by name, in rank order.
        progress: called between parts.
    """
    marks = json.dumps({name: asdict(mark) for name, mark in files.items()})
    yield f'{{"format": {FORMAT}, "written": {time.time()}, "step": {step}, "state": {state}, '
    yield f'"files": {marks}, "entries": ['
    for start in range(0, len(entries), _PART):
        progress()
        part = json.dumps([vars(entry) for entry in entries[start : start + _PART]])
        yield (", " if start else "") + part[1:-1]
    yield "]}"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def entries_of(owned: Tensors, file: str) -> tuple[tuple[Entry, ...], dict[str, Tensor]]:
    """A rank's entries of the index, and its tensors by their keys in its file."""
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
    """Read the index of the checkpoint `path`.

    Raises:
        ValueError: it is damaged or has another format.
    """
    try:
        content = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / INDEX} cannot be read ({error}); {fix(path)}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path / INDEX} is not a checkpoint index of format {FORMAT}: resume with the spmdrl "
            f"that wrote it, or {fix(path)}"
        )
    try:
        return Index(
            written=float(content.get("written", 0.0)),
            step=content["step"],
            state=content["state"],
            files={name: Mark(**mark) for name, mark in content["files"].items()},
            entries=tuple(_entry(raw) for raw in content["entries"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / INDEX} is damaged ({error!r}); {fix(path)}") from None


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


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory has a name of this project's checkpoints; other names are the user's.

    Names are `step_STEPS`, with `+CALLS` if stopped within a step, and `.N` if the name was taken.
    """
    return re.fullmatch(r"step_\d{8,}(\+\d{4,})?(\.\d+)?", name) is not None


def fix(path: Path) -> str:
    """Advice on a damaged checkpoint, for error messages."""
    return f"write the name of an older checkpoint into {path.parent / LATEST}"
