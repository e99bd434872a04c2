"""Checkpoints: every rank writes the slices that it owns, and any layout reads them back.

A checkpoint is a directory `step_NNNNNNNN` with one safetensors file per writing rank and
`checkpoint.json`: the counters, the size of every file, and an index of (tensor, slice) -> file. It
is written under a temporary name, every file fsynced, and renamed when complete; then `latest`
names it: a reader never sees a partial one.

Tensors are kept as slices of global tensors, so a checkpoint loads on other ranks and layouts.
What there is to resume from is decided by rank 0 alone, as ranks may see a shared file system at
different times.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spmdrl.checkpoint.stream import write_safetensors
from spmdrl.distributed.reduce import agreed, broadcast_object
from spmdrl.files import replace_file, sync
from spmdrl.files import set_aside as set_path_aside
from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import local_box, overlap, within

Result = TypeVar("Result")

Tensors = Mapping[str, tuple[Tensor, tuple[Slice, ...]]]
"""`group/local name` -> local tensor and its slices; the group keeps equal names apart."""

FORMAT = 2
INDEX = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class _Entry:
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
class _Index:
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, int]
    """Bytes of each file."""
    entries: tuple[_Entry, ...]


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Part of an entry, and the view of a local tensor where it goes."""

    file: str
    key: str
    part: tuple[slice, ...]
    target: Tensor


def save_checkpoint(
    root: Path, step: int, owned: Tensors, state: Mapping[str, Any], *, keep_last: int
) -> Path:
    """Write `root/step_NNNNNNNN`; every rank of the world calls it with what it writes.

    Args:
        owned: this rank's tensors with the slices that it is to write: each slice of the global
            tensors is given by one rank (`owners.slice_owners` says by which).
        state: JSON values, equal on all ranks.
        keep_last: checkpoints kept; those written longest ago are removed, after the rename.

    Raises:
        OSError: a full disk or an unwritable directory, on every rank and naming the path; older
            checkpoints are untouched.
    """
    rank = dist.get_rank()
    final, partial = root / f"step_{step:08d}", root / ".partial"
    file = f"rank_{rank:05d}.safetensors"
    try:
        agreed(OSError, lambda: _fresh_directory(partial) if rank == 0 else None)
        entries, boxes = _entries(owned, file)
        size = agreed(OSError, lambda: _write(partial / file, boxes))
        parts = _to_first((size, entries))
        agreed(
            OSError,
            lambda: (
                _publish(partial, final, _index(step, state, parts), keep_last)
                if rank == 0
                else None
            ),
        )
    except OSError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"the checkpoint {final} could not be written ({error}): free space or choose another "
            "run_dir; earlier checkpoints are untouched"
        ) from None
    return final


def resume_point(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint below `root` and its state, as rank 0 sees them; None without one.

    Every rank of the world calls it and gets the same.

    Raises:
        ValueError: `latest` or the index is damaged, on every rank.
    """

    def find() -> tuple[Path, dict[str, Any]] | None:
        path = latest_checkpoint(root) if dist.get_rank() == 0 else None
        return None if path is None else (path, read_state(path))

    found: tuple[Path, dict[str, Any]] | None = broadcast_object(agreed(ValueError, find), 0)
    return found


def set_aside(root: Path) -> Path | None:
    """Rename `root` to `root.old-1` (or -2, ...) if it holds checkpoints; the new name.

    So a run that starts afresh is not mixed with an older one, and nothing is lost. Every rank of
    the world calls it.

    Raises:
        OSError: it cannot be renamed, on every rank.
    """

    def rename() -> Path | None:
        if dist.get_rank() != 0 or not any(root.glob("step_*")):
            return None
        return set_path_aside(root)

    renamed: Path | None = broadcast_object(agreed(OSError, rename), 0)
    return renamed


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None, as this rank sees it.

    Raises:
        ValueError: `latest` names a directory that is not there.
    """
    pointer = root / "latest"
    if not pointer.is_file():
        return None
    path = root / pointer.read_text(encoding="utf-8").strip()
    if not (path / INDEX).is_file():
        raise ValueError(
            f"{pointer} names {path.name!r}, which has no {INDEX}: "
            "write the name of a complete step_* directory into it, or delete it to start afresh"
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint.

    Raises:
        ValueError: the index is damaged or of another format.
    """
    return dict(_read_index(path).state)


@torch.no_grad()
def load_tensors(path: Path, tensors: Tensors) -> None:
    """Fill local tensors from a checkpoint that any layout wrote; every rank of the world calls it.

    Files and index are checked before the first tensor changes.

    Raises:
        ValueError: a slice or a file is missing, a file is damaged, or the checkpoint is of another
            model: on every rank, naming tensor and file.
    """
    reads, files = agreed(ValueError, lambda: _plan_reads(path, tensors))
    for read in reads:
        read.target.copy_(files[read.file].get_slice(read.key)[read.part])


def _plan_reads(path: Path, tensors: Tensors) -> tuple[list[_Read], dict[str, Any]]:
    """What this rank reads, and the files that it opened for it."""
    index = _read_index(path)
    for file, size in index.files.items():
        found = (path / file).stat().st_size if (path / file).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise ValueError(f"{path / file} {state}; {_mend(path)}")
    by_name: dict[tuple[str, str], list[_Entry]] = {}
    for entry in index.entries:
        by_name.setdefault((entry.group, entry.name), []).append(entry)
    reads = []
    for full_name, (tensor, slices) in tensors.items():
        group = full_name.split("/", 1)[0]
        for piece in slices:
            entries = by_name.get((group, piece.name), [])
            reads += _reads_of(path, entries, group, piece, local_box(tensor, piece))
    files = {file: _open(path / file) for file in sorted({read.file for read in reads})}
    return reads, files


def _reads_of(
    path: Path, entries: list[_Entry], group: str, piece: Slice, box: Tensor
) -> list[_Read]:
    shapes = {entry.shape for entry in entries}
    if shapes != {piece.shape}:
        found = " and ".join(map(str, sorted(shapes))) or "nothing"
        raise ValueError(
            f"{path} has {found} for {group}/{piece.name}, which is {piece.shape} here: the "
            "checkpoint is of another model or role"
        )
    reads, filled = [], 0
    for entry in entries:
        if (ranges := overlap(entry.piece, piece)) is not None:
            target = box[within(ranges, piece)]
            part = within(ranges, entry.piece)
            reads.append(_Read(file=entry.file, key=entry.key, part=part, target=target))
            filled += target.numel()
    if filled != piece.numel:
        raise ValueError(
            f"{path} has {filled} of the {piece.numel} values of {group}/{piece.name} that rank "
            f"{dist.get_rank()} needs; {_mend(path)}"
        )
    return reads


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_mend(path.parent)}") from None


def _mend(path: Path) -> str:
    return f"write the name of an older checkpoint into {path.parent / 'latest'}"


def _entries(owned: Tensors, file: str) -> tuple[list[_Entry], dict[str, Tensor]]:
    """What this rank writes: entries of the index, and the tensors by their keys in the file."""
    entries, boxes = [], {}
    for full_name, (tensor, slices) in owned.items():
        for piece in slices:
            key = f"{full_name}#{piece.offset}"
            boxes[key] = local_box(tensor, piece)
            entries.append(
                _Entry(
                    group=full_name.split("/", 1)[0],
                    name=piece.name,
                    shape=piece.shape,
                    start=piece.start,
                    stop=piece.stop,
                    file=file,
                    key=key,
                )
            )
    return entries, boxes


def _write(path: Path, boxes: Mapping[str, Tensor]) -> int:
    """Bytes written; 0 and no file where this rank owns nothing."""
    return write_safetensors(path, boxes) if boxes else 0


def _index(
    step: int, state: Mapping[str, Any], parts: Sequence[tuple[int, list[_Entry]]]
) -> _Index:
    entries = tuple(entry for _, found in parts for entry in found)
    places = {(entry.group, entry.piece) for entry in entries}
    assert len(places) == len(entries), f"{len(entries) - len(places)} slices were written twice"
    return _Index(
        step=step,
        state=state,
        files={f"rank_{r:05d}.safetensors": n for r, (n, _) in enumerate(parts) if n > 0},
        entries=entries,
    )


def _publish(partial: Path, final: Path, index: _Index, keep_last: int) -> None:
    entries = [vars(entry) for entry in index.entries]
    content = {"format": FORMAT, **vars(index), "entries": entries}
    replace_file(partial / INDEX, json.dumps(content).encode())
    sync(partial)
    replaced = final.parent / ".replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # an older run's, or this step's once more
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    replace_file(final.parent / "latest", final.name.encode())
    others = [path for path in final.parent.glob("step_*") if path != final]
    others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in [replaced, *others[: max(0, len(others) + 1 - keep_last)]]:
        shutil.rmtree(path, ignore_errors=True)  # what stays goes with the next checkpoint


def _fresh_directory(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _read_index(path: Path) -> _Index:
    try:
        content = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / INDEX} cannot be read ({error}); {_mend(path)}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(
            f"{path / INDEX} is not a checkpoint index of format {FORMAT}; {_mend(path)}"
        )
    try:
        entries = tuple(_entry(raw) for raw in content.pop("entries"))
        return _Index(entries=entries, **content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / INDEX} is damaged ({error!r}); {_mend(path)}") from None


def _entry(raw: Mapping[str, Any]) -> _Entry:
    return _Entry(
        group=raw["group"],
        name=raw["name"],
        shape=tuple(raw["shape"]),
        start=tuple(raw["start"]),
        stop=tuple(raw["stop"]),
        file=raw["file"],
        key=raw["key"],
    )


def _to_first(value: Result) -> list[Result]:
    """Every rank's value, in rank order, on rank 0; nothing elsewhere."""
    rank, size = dist.get_rank(), dist.get_world_size()
    values: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []
