"""Reading of checkpoints: the choice of one to resume from, and tensors of any layout from it.

Only rank 0 chooses, because ranks may see a shared file system at different times.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spmdrl.atomic_files import set_aside as set_path_aside
from spmdrl.checkpoint.index import (
    INDEX,
    LATEST,
    PRIVATE,
    Entry,
    Index,
    Mark,
    Tensors,
    fix,
    is_checkpoint_name,
    rank_file,
    read_index,
)
from spmdrl.distributed.reduce import agreed, broadcast_object
from spmdrl.models.local_shards import local_box
from spmdrl.models.tensors import Slice
from spmdrl.weights.layout import overlap, within

log = logging.getLogger(__name__)

_CHUNK = 1 << 26


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Part of an entry, and the view of a local tensor to copy it into."""

    file: str
    key: str
    part: tuple[slice, ...]
    target: Tensor


def resume_point(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint below `root` and its state, as rank 0 sees them; None if there is none.

    Every rank of the world calls it and gets the same result.

    Raises:
        ValueError: `latest` or the index is damaged; raised on every rank.
    """

    def find() -> tuple[Path, dict[str, Any]] | None:
        path = latest_checkpoint(root) if dist.get_rank() == 0 else None
        return None if path is None else (path, read_state(path))

    found: tuple[Path, dict[str, Any]] | None = broadcast_object(agreed(ValueError, find), 0)
    return found


def set_aside(root: Path) -> Path | None:
    """Rename `root` to `root.old-1` (or -2, ...) if it holds checkpoints; returns the new path.

    So a new run is not mixed with an older one, and nothing is lost. Every rank of the world calls
    it.

    Raises:
        OSError: it cannot be renamed; raised on every rank.
    """

    def rename() -> Path | None:
        if dist.get_rank() != 0 or not any(root.glob("step_*")):
            return None
        return set_path_aside(root)

    renamed: Path | None = broadcast_object(agreed(OSError, rename), 0)
    return renamed


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None, as this rank sees it.

    If there are checkpoints and `latest` names none (it was lost, or a full disk left it empty),
    the one written last is chosen, with a warning.

    Raises:
        ValueError: `latest` names no complete checkpoint, or no checkpoint is complete.
    """
    pointer = root / LATEST
    names = sorted(path.name for path in root.glob("step_*") if path.is_dir())
    other = ", ".join(names) or "there is none"
    afresh = "set checkpoint.resume=false, which keeps them aside, to start afresh"
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        name = ""
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{pointer} cannot be read ({error}): write the name of a checkpoint into it "
            f"({other}), or {afresh}"
        ) from None
    if not name and not names and not pointer.exists():
        return None
    if not name:
        path = _written_last(root, names)
        if path is None:
            raise ValueError(
                f"{pointer} names no checkpoint, and none below {root} is complete ({other}): "
                f"{afresh}"
            )
        log.warning(
            "%s names no checkpoint: the run resumes from %s, which was written last; to "
            "resume from another, write its name into that file; %s",
            *(pointer, path.name, afresh),
        )
        return path
    path = root / name
    if "\0" in name or path.parent != root or not (path / INDEX).is_file():
        raise ValueError(
            f"{pointer} names {name!r}, which has no {INDEX}: write the name of a complete "
            f"checkpoint into it ({other}), or {afresh}"
        )
    return path


def _written_last(root: Path, names: Sequence[str]) -> Path | None:
    """The complete checkpoint with the latest time in its index; copied files keep no times."""
    found = []
    for name in names:
        path = root / name
        if not is_checkpoint_name(name):
            continue
        try:
            index = read_index(path)
        except ValueError:
            continue
        sizes = {file: mark.num_bytes for file, mark in index.files.items()}
        if all(_size(path / file) == size for file, size in sizes.items()):
            found.append((index.written, (path / INDEX).stat().st_mtime, index.step, name))
    return root / max(found)[-1] if found else None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, as JSON values.

    Raises:
        ValueError: the index is damaged or has another format.
    """
    return dict(read_index(path).state)


@torch.no_grad()
def load_tensors(path: Path, tensors: Tensors) -> None:
    """Fill local tensors from a checkpoint of any layout; every rank of the world calls it.

    Before the first tensor changes, the index and every file are checked, each file in full by one
    rank.

    Raises:
        ValueError: a slice or a file is missing, a file is damaged, or the checkpoint is of another
            model; raised on every rank, naming tensor or file.
    """
    index = agreed(ValueError, lambda: read_index(path))
    agreed(ValueError, lambda: _check_files(path, index.files))
    reads, files = agreed(ValueError, lambda: _plan_reads(path, index, tensors))
    for read in reads:
        read.target.copy_(files[read.file].get_slice(read.key)[read.part])


def read_private(path: Path, rank: int) -> dict[str, Tensor]:
    """The private tensors of rank `rank` among those that wrote the checkpoint, by name.

    Raises:
        ValueError: the rank's file is damaged.
    """
    file = open_file(path / rank_file(rank))
    names = [key for key in file.keys() if key.startswith(PRIVATE)]  # noqa: SIM118
    return {name.removeprefix(PRIVATE): file.get_tensor(name) for name in names}


def _check_files(path: Path, files: Mapping[str, Mark]) -> None:
    """Check this rank's share of the files."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, mark in list(files.items())[rank::size]:
        check_file(path / name, mark)


def check_file(file: Path, mark: Mark) -> None:
    """Raise ValueError if a file of a checkpoint is missing or damaged."""
    found = _size(file)
    if found != mark.num_bytes:
        state = "is missing" if found is None else f"has {found} bytes, not {mark.num_bytes}"
        raise ValueError(f"{file} {state}; {fix(file.parent)}")
    if _xxh3(file) != mark.xxh3:
        raise ValueError(f"{file} is damaged (its checksum differs); {fix(file.parent)}")


def _xxh3(path: Path) -> str:
    checksum = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            checksum.update(chunk)
    return checksum.hexdigest()


def _plan_reads(path: Path, index: Index, tensors: Tensors) -> tuple[list[_Read], dict[str, Any]]:
    """The reads of this rank, and the files that it opened for them."""
    by_name: dict[tuple[str, str], list[Entry]] = {}
    for entry in index.entries:
        by_name.setdefault((entry.group, entry.name), []).append(entry)
    reads = []
    for full_name, (tensor, slices) in tensors.items():
        group = full_name.split("/", 1)[0]
        for piece in slices:
            entries = by_name.get((group, piece.name), [])
            reads += _reads_of(path, entries, group, piece, local_box(tensor, piece))
    files = {file: open_file(path / file) for file in sorted({read.file for read in reads})}
    return reads, files


def _reads_of(
    path: Path, entries: list[Entry], group: str, piece: Slice, box: Tensor
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
            f"{dist.get_rank()} needs; {fix(path)}"
        )
    return reads


def open_file(path: Path) -> Any:
    """Open a file of a checkpoint; ValueError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); {fix(path.parent)}") from None
