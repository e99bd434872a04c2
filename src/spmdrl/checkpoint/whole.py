"""Whole tensors of a checkpoint, read by one process without a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmdrl.checkpoint.index import Entry, fix, is_checkpoint_name, read_index
from spmdrl.checkpoint.load import check_file, latest_checkpoint, open_file


def find_checkpoint(root: Path, step: int | None) -> Path:
    """Find the newest checkpoint below `root`, or the newest of those after `step` steps; one that
    was written within the next step counts only where no other is left.

    Raises:
        ValueError: there is none; the steps that have one are listed.
    """
    found = latest_checkpoint(root) if step is None else _of_step(root, step)
    if found is not None:
        return found
    steps = sorted({_steps(path) for path in _checkpoints(root)})
    if not steps:
        raise ValueError(f"there is no checkpoint in {root}")
    listed = ", ".join(map(str, steps))
    raise ValueError(f"{root} has no checkpoint of step {step}: there are those of {listed}")


def _of_step(root: Path, step: int) -> Path | None:
    there = [path for path in _checkpoints(root) if _steps(path) == step]
    return max(
        there, key=lambda path: ("+" not in path.name, read_index(path).written), default=None
    )


def _checkpoints(root: Path) -> list[Path]:
    return [path for path in root.glob("step_*") if is_checkpoint_name(path.name)]


def _steps(path: Path) -> int:
    digits = path.name.removeprefix("step_")
    return int(digits.partition("+")[0].partition(".")[0])


class WholeTensors:
    """Global tensors of one group, each assembled from its slices when it is read.

    The files that hold some of it are checked first.

    Args:
        path: the checkpoint.
        group: name of the group, `policy.weights` for example.

    Raises:
        ValueError: the index or a file is damaged or missing.
    """

    def __init__(self, path: Path, group: str) -> None:
        self._path, self._group = path, group
        index = read_index(path)
        self.state = index.state
        self.groups = {entry.group for entry in index.entries}
        """Names of all groups of the checkpoint."""
        self._entries: dict[str, list[Entry]] = {}
        for entry in index.entries:
            if entry.group == group:
                self._entries.setdefault(entry.name, []).append(entry)
        needed = {entry.file for entries in self._entries.values() for entry in entries}
        self._files: dict[str, Any] = {}
        for name in sorted(needed):
            check_file(path / name, index.files[name])
            self._files[name] = open_file(path / name)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    @torch.no_grad()
    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a whole tensor, in the checkpoint's dtype, on the CPU.

        Raises:
            ValueError: it has another shape, or lacks values.
        """
        entries = self._entries[name]
        if {entry.shape for entry in entries} != {shape}:
            raise ValueError(
                f"{self._path} has {entries[0].shape} for {self._group}/{name}, which is {shape} "
                "here: the checkpoint is of another model"
            )
        whole, filled = None, 0
        for entry in entries:
            box = self._files[entry.file].get_tensor(entry.key)
            if whole is None:
                whole = torch.empty(shape, dtype=box.dtype)
            whole[tuple(slice(a, b) for a, b in zip(entry.start, entry.stop, strict=True))] = box
            filled += entry.piece.numel
        assert whole is not None, name
        if filled != whole.numel():
            raise ValueError(
                f"{self._path} has {filled} of the {whole.numel()} values of {self._group}/{name}; "
                f"{fix(self._path)}"
            )
        return whole
