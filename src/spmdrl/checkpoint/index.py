"""The layout of a checkpoint.

A checkpoint is a directory `step_NNNNNNNN` with one safetensors file per rank and
`checkpoint.json`: the state, size and checksum of every file, and an index of (tensor, slice) ->
file. Tensors are stored as slices of global tensors, so a checkpoint loads on other ranks and
layouts. Tensors of only one rank (`private/...` in its file) are not in the index. Reading executes
nothing: the files are JSON and safetensors.

Owners of slices: one rank writes each slice, and holders write about equally many values.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spmdrl.models.local_shards import WeightLayout, local_box
from spmdrl.models.tensors import Slice
from spmdrl.weights.layout import key

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


def slice_owners(layout: WeightLayout) -> dict[Slice, int]:
    """Every distinct slice of a layout (apart from its local place) -> the rank that writes it.

    A pure function, so that ranks need no messages. Slices that only one rank holds come first,
    then larger ones first; each goes to its holder with the fewest values so far.
    """
    # ranks at equal places share one table: thousands of ranks have hundreds of tables
    classes: dict[int, list[int]] = {}
    for rank in sorted(layout):
        classes.setdefault(id(layout[rank]), []).append(rank)
    holders: dict[Slice, list[int]] = {}
    for number, same in enumerate(classes.values()):
        for held in layout[same[0]].values():
            for piece in held.slices:
                holders.setdefault(key(piece), []).append(number)
    members = list(classes.values())
    ranks_of = {
        numbers: np.sort(np.concatenate([members[number] for number in numbers]))
        for numbers in set(map(tuple, holders.values()))
    }
    found = [(piece, piece.numel, ranks_of[tuple(held)]) for piece, held in holders.items()]
    found.sort(key=lambda one: (len(one[2]) > 1, -one[1]))
    load = np.zeros(max(layout, default=-1) + 1, dtype=np.int64)
    owners = {}
    for piece, numel, ranks in found:
        owner = ranks[0] if len(ranks) == 1 else ranks[load[ranks].argmin()]  # the first of equals
        load[owner] += numel
        owners[piece] = int(owner)
    return owners


def frozen_slices(layout: WeightLayout) -> frozenset[Slice]:
    """The slices of a layout (apart from their local places) that have no optimizer state."""
    return frozenset(
        key(piece)
        for table in {id(table): table for table in layout.values()}.values()
        for held in table.values()
        if held.frozen
        for piece in held.slices
    )


def only(tensors: Tensors, owned: Set[Slice], frozen: Set[Slice] = frozenset()) -> Tensors:
    """The tensors, each with those of its slices that are in `owned`.

    Each group of tensors must contain all of `owned`, or the checkpoint would lack some of it;
    `frozen` slices are required only of the weights.
    """
    kept = {
        name: (tensor, tuple(piece for piece in slices if key(piece) in owned))
        for name, (tensor, slices) in tensors.items()
    }
    found: dict[str, set[Slice]] = {}
    for name, (_, slices) in kept.items():
        found.setdefault(name.split("/", 1)[0], set()).update(map(key, slices))
    for group, here in found.items():
        needed = owned if group == "weights" else owned - frozen
        assert here == needed, (group, needed - here)
    return kept
