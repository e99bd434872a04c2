"""Experts that files hold stacked, all of a layer in one tensor, one by one as models have them.

`transformers` reads both forms for the same model, and writes experts one by one; the files
of Qwen3.5-35B-A3B hold them stacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.files.stored_tensors import Entry
from spmdrl.models.files.weight_files import Checkpoint
from spmdrl.models.specs import MoeMlp

_PARTS = {"all_gate_up": ("gate", "up"), "all_down": ("down",)}
"""A layer's stacked tensors, and the matrices of each expert in them, top to bottom."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMatrix:
    """One expert's matrix [rows, columns], which begins at row `start` of a stacked tensor's."""

    stacked: Entry
    expert: int
    start: int
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.stacked.file

    @property
    def dtype(self) -> str:
        return self.stacked.dtype

    def read(self, box: tuple[slice, ...]) -> Tensor:
        """Return the values of a box."""
        rows, columns = box
        rows = slice(self.start + rows.start, self.start + rows.stop)
        return self.stacked.read((slice(self.expert, self.expert + 1), rows, columns))[0]


def one_by_one(checkpoint: Checkpoint, model: ModelConfig) -> Checkpoint:
    """Return the checkpoint with the matrices of each expert by itself, where the model has them
    so.

    A stacked tensor of another shape stays, and is named when the checkpoint is inspected.
    """
    entries = dict(checkpoint.entries)
    for number, layer in enumerate(model.layers):
        if isinstance(layer.mlp, MoeMlp) and layer.mlp.form == "each":
            for whole, parts in _PARTS.items():
                _take_apart(entries, model, number, layer.mlp, whole, parts)
    if entries.keys() == checkpoint.entries.keys():
        return checkpoint
    return Checkpoint(checkpoint.path, entries, checkpoint.notes)


def _take_apart(
    entries: dict[str, Entry],
    model: ModelConfig,
    layer: int,
    mlp: MoeMlp,
    whole: str,
    parts: tuple[str, ...],
) -> None:
    prefix, module = f"model.layers.{layer}.", model.family.module
    name = prefix + module(f"mlp.experts.{whole}")
    stacked = entries.get(name)
    wide = (mlp.num_experts, len(parts) * mlp.width, model.hidden_size)
    shape = wide if len(parts) > 1 else (mlp.num_experts, model.hidden_size, mlp.width)
    if stacked is None or stacked.shape != shape:
        return
    names = [f"{prefix}{module(f'mlp.experts.{part}')}.weight" for part in parts]
    every = [each.format(expert) for each in names for expert in range(mlp.num_experts)]
    if any(each in entries for each in every):
        return
    del entries[name]
    rows = shape[1] // len(parts)
    for expert in range(mlp.num_experts):
        for number, each in enumerate(names):
            entries[each.format(expert)] = ExpertMatrix(
                stacked=stacked, expert=expert, start=number * rows, shape=(rows, shape[2])
            )
