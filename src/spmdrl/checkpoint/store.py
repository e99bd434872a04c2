"""Checkpoints: every rank writes the slices that it owns, and any layout reads them back.

A checkpoint is a directory `step_NNNNNNNN` with one safetensors file per writing rank and
`checkpoint.json`: the counters, and an index of (tensor, slice) -> file. It is written under a
temporary name, every file fsynced, and renamed when complete; `latest` names it last. A reader never
sees a partial one.

Tensors are kept as slices of global tensors, so a checkpoint loads on other ranks and layouts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spmdrl.distributed.reduce import gather_objects
from spmdrl.models.sharding import Slice
from spmdrl.weights.layout import local_box, overlap, within

Tensors = Mapping[str, tuple[Tensor, tuple[Slice, ...]]]
"""`group/local name` -> local tensor and its slices; the group keeps equal names apart."""

FORMAT = 1
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


def save_checkpoint(
    root: Path, step: int, tensors: Tensors, state: Mapping[str, Any], *, keep_last: int
) -> Path:
    """Write `root/step_NNNNNNNN`; every rank of the world calls it with its own tensors.

    Args:
        state: JSON values, equal on all ranks.
        keep_last: older complete checkpoints beyond this number are removed, after the rename.

    Raises:
        OSError: a full disk or an unwritable directory, on every rank and naming the path; older
            checkpoints are untouched.
    """
    rank = dist.get_rank()
    final = root / f"step_{step:08d}"
    temporary = root / f"step_{step:08d}.partial"
    if rank == 0:
        _attempt(lambda: _fresh_directory(temporary))
    else:
        _attempt(lambda: None)
    owned = _owned(tensors)
    file = f"rank_{rank:05d}.safetensors"
    entries = [replace(entry, file=file) for entry, _ in owned]
    _attempt(lambda: _write_tensors(temporary / file, owned))
    index = [entry for part in gather_objects(entries) for entry in part]
    content = {"format": FORMAT, "step": step, "state": dict(state)}

    def publish() -> None:
        if rank == 0:
            content["entries"] = [asdict(entry) for entry in index]
            write_atomic(temporary / INDEX, json.dumps(content))
            _fsync_directory(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            write_atomic(root / "latest", final.name)
            _remove_old(root, keep_last)

    _attempt(publish)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None.

    Raises:
        ValueError: `latest` names a directory that is not there.
    """
    pointer = root / "latest"
    if not pointer.is_file():
        return None
    path = root / pointer.read_text(encoding="utf-8").strip()
    if not (path / INDEX).is_file():
        raise ValueError(
            f"{pointer} names {path.name}, which has no {INDEX}: "
            "write the name of a complete step_* directory into it, or delete it to start afresh"
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The JSON values of a checkpoint.

    Raises:
        ValueError: the index is damaged or of another format.
    """
    return dict(_read_index(path)["state"])


@torch.no_grad()
def load_tensors(path: Path, tensors: Tensors) -> None:
    """Fill local tensors from a checkpoint that any layout wrote.

    Raises:
        ValueError: a slice is missing or a shard is truncated, naming tensor and file.
    """
    by_name: dict[tuple[str, str], list[_Entry]] = {}
    for raw in _read_index(path)["entries"]:
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        entry = _Entry(**fields)
        by_name.setdefault((entry.group, entry.name), []).append(entry)
    files: dict[str, Any] = {}
    for full_name, (tensor, slices) in tensors.items():
        group = full_name.split("/", 1)[0]
        for piece in slices:
            filled = 0
            for entry in by_name.get((group, piece.name), []):
                ranges = overlap(entry.piece, piece)
                if ranges is None:
                    continue
                values = _read(path, entry, files)[within(ranges, entry.piece)]
                local_box(tensor, piece)[within(ranges, piece)].copy_(values)
                filled += values.numel()
            if filled != piece.numel:
                raise ValueError(
                    f"{path}: {group}/{piece.name} has {filled} of the {piece.numel} values that "
                    f"rank {dist.get_rank()} needs: the checkpoint is of another model"
                )


def write_atomic(path: Path, text: str) -> None:
    """Write a small file under a temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _owned(tensors: Tensors) -> list[tuple[_Entry, Tensor]]:
    """This rank's slices that no lower rank holds too: each slice is written once."""
    mine: dict[tuple[str, Slice], tuple[str, Tensor]] = {}
    for full_name, (tensor, slices) in tensors.items():
        group = full_name.split("/", 1)[0]
        for piece in slices:
            bare = replace(piece, offset=0)
            mine[group, bare] = (f"{full_name}#{piece.offset}", local_box(tensor, piece))
    lower = set().union(*gather_objects(set(mine))[: dist.get_rank()])
    return [
        (
            _Entry(
                group=group,
                name=piece.name,
                shape=piece.shape,
                start=piece.start,
                stop=piece.stop,
                file="",
                key=key,
            ),
            box,
        )
        for (group, piece), (key, box) in mine.items()
        if (group, piece) not in lower
    ]


def _write_tensors(path: Path, owned: list[tuple[_Entry, Tensor]]) -> None:
    if not owned:
        return
    try:
        save_file({entry.key: box.detach().cpu().contiguous() for entry, box in owned}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _attempt(action: Any) -> None:
    """Run `action`; if it fails with OSError on one rank, every rank raises, naming that rank."""
    failure = None
    try:
        action()
    except OSError as error:
        failure = f"rank {dist.get_rank()}: {error}"
    failures = [text for text in gather_objects(failure) if text is not None]
    if failures:
        raise OSError(
            f"the checkpoint could not be written ({failures[0]}): free space or choose another "
            "run_dir; earlier checkpoints are untouched"
        )


def _fresh_directory(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(root: Path, keep_last: int) -> None:
    complete = sorted(p for p in root.glob("step_????????") if (p / INDEX).is_file())
    for path in complete[:-keep_last]:
        shutil.rmtree(path)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / INDEX} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path / INDEX} is not a checkpoint index of format {FORMAT}")
    return content


def _read(path: Path, entry: _Entry, files: dict[str, Any]) -> Tensor:
    try:
        if entry.file not in files:
            files[entry.file] = safe_open(path / entry.file, framework="pt")
        tensor: Tensor = files[entry.file].get_tensor(entry.key)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path / entry.file} is damaged or missing ({entry.group}/{entry.name}: {error}); "
            f"write the name of an older checkpoint into {path.parent / 'latest'}"
        ) from None
    return tensor
