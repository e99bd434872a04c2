"""What lies where in a checkpoint.

A checkpoint is a directory `step_NNNNNNNN` with one safetensors file per rank and
`checkpoint.json`: the state, size and checksum of every file, and an index of (tensor, slice) ->
file. Tensors are kept as slices of global tensors, so a checkpoint loads on other ranks and
layouts. What belongs to one rank alone (`private/...` in its file) does not stand in the index.
Reading it executes nothing: the files are JSON and safetensors.
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

from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import local_box

Tensors = Mapping[str, tuple[Tensor, tuple[Slice, ...]]]
"""`group/local name` -> local tensor and its slices; the group keeps equal names apart."""

FORMAT = 4
INDEX = "checkpoint.json"
LATEST = "latest"
PRIVATE = "private/"
CHECKPOINTS = "checkpoints"
"""The part of the state that names the run's checkpoints that were there before."""

_PART = 2000
"""Entries that are made JSON at once: some milliseconds."""


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
    written: when, in seconds since 1970; 0: it does not say.
    state: JSON values.
    files: by name, in rank order.
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
    """The index's JSON in parts: a large one takes seconds, in which others must get their turn.

    Args:
        state: its JSON.
        files: by name, in rank order.
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
            written=float(content.get("written", 0.0)),
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


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory is called as this project calls checkpoints: other names are the user's.

    `step_STEPS`, `+CALLS` in one that was stopped, `.N` where the name was taken.
    """
    return re.fullmatch(r"step_\d{8,}(\+\d{4,})?(\.\d+)?", name) is not None


def mend(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"write the name of an older checkpoint into {path.parent / LATEST}"
