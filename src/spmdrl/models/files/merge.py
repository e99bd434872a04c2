"""`spmdrl convert --merge`: an adapter added to the matrices of its base, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spmdrl.models.adapter_weights import merged
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig, read_config
from spmdrl.models.files.adapter_sources import WithAdapter
from spmdrl.models.files.export import cast, files_dtype, save_pretrained
from spmdrl.models.files.hf import TensorSource, open_model
from spmdrl.models.files.inspection import head_of
from spmdrl.models.files.peft import PeftFiles, open_peft, other_base
from spmdrl.models.files.scalar_head import find_scalar_head
from spmdrl.models.files.weight_files import open_checkpoint
from spmdrl.models.local_shards import LocalTensors
from spmdrl.models.model_classes import skipped_token
from spmdrl.models.sharding import SCORE, Head, global_shapes
from spmdrl.models.tensors import Slice

MERGE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_FEW = 0.5
"""Share of an adapter's changes below which a merge keeps few of them."""


@dataclass(kw_only=True)
class MergeReport:
    """Report on a merge, complete once the last matrix was merged.

    Args:
        dtype: dtype of the files; None: each matrix keeps its own.
        matrices: number of matrices that were added to.
        moved: their elements that change in float32.
        kept: those that also change in the dtype of the files.
        notes: oddities of the directories.
    """

    dtype: torch.dtype | None
    matrices: int = 0
    moved: int = 0
    kept: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set, init=False)
    notes: list[str] = field(default_factory=list)

    def merge(self, tensor: Tensor, whole: Slice, adapter: Adapter, pair: LocalTensors) -> Tensor:
        """Return a target with the adapter added in float32 and rounded once, and count what
        changes.

        Args:
            tensor, whole: the matrix, and the slice that is all of it.
            pair: all of its A and B, by any local names.

        Raises:
            ValueError: float16 cannot hold one of the sums.
        """
        dtype = tensor.dtype if self.dtype is None else self.dtype
        wide = merged(tensor.float(), (whole,), adapter, pair)
        narrow, is_moved = cast(whole.name, wide, dtype), wide != tensor
        self.dtypes.add(dtype)
        self.matrices += 1
        self.moved += int(is_moved.sum())
        self.kept += int((is_moved & (narrow != tensor.to(dtype))).sum())
        return narrow

    @property
    def lines(self) -> list[str]:
        """Notes, and how many elements changed."""
        share = self.kept / self.moved if self.moved else 1.0
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        text = f"{self.matrices} matrices merged: {self.kept} of {self.moved} elements that the "
        text += f"adapter changes differ in {names}"
        if not self.moved:
            text = f"{self.matrices} matrices merged, none changed: the adapter adds nothing"
        elif share < _FEW:
            text += (
                f" ({share:.0%}): the others are lost to rounding: write --dtype float32, or use "
                "the adapter unmerged"
            )
        return [*(f"note: {note}" for note in self.notes), text]


def merge_adapter(
    source: str | Path, adapter: str | Path, out_dir: str | Path, dtype: str | None = None
) -> MergeReport:
    """Write the base `source` with an adapter merged into it as a Hugging Face directory.

    Every matrix is W + scale B A, computed in float32 and rounded once. Embeddings and heads are no
    targets, so that a tied embedding stays as it is; a scalar head of the adapter takes the place
    of the base's head.

    Args:
        adapter: a PEFT directory.
        dtype: a key of `MERGE_DTYPES`; None keeps each tensor's own.

    Raises:
        ValueError: base or adapter are refused, or `out_dir` is one of them.
        OSError: a file could not be read or written.
    """
    for given in (source, adapter):
        if Path(out_dir).resolve() == Path(given).resolve():
            raise ValueError(f"{out_dir} is read for the merge: give another directory to write")
    if dtype is not None and dtype not in MERGE_DTYPES:
        raise ValueError(f"--dtype {dtype}: it must be one of {', '.join(MERGE_DTYPES)}")
    config = read_config(source)
    opened = open_peft(adapter, config, head="score")
    has_head = SCORE in opened.tensors.names
    found = find_scalar_head(config, open_checkpoint(source))
    head: Head = "score" if has_head else head_of(found)
    model, base = open_model(
        source,
        head=head,
        head_init="zero" if has_head else "file",
    )
    report = MergeReport(
        dtype=None if dtype is None else MERGE_DTYPES[dtype],
        notes=other_base(opened.file, source),
    )
    head_dtype = files_dtype(source, model) if report.dtype is None else report.dtype
    tensors = _merged(model, head, base, opened, report, head_dtype)
    save_pretrained(
        tensors,
        model,
        out_dir,
        source,
        head=head,
        dtype=None if dtype is None else MERGE_DTYPES[dtype],
        skipped=skipped_token(model.source, model.pad_id) if head == "score" else None,
    )
    return report


def _merged(
    model: ModelConfig,
    head: Head,
    base: TensorSource,
    opened: PeftFiles,
    report: MergeReport,
    head_dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, the adapter's scalar head in `head_dtype`."""
    source = WithAdapter(base, opened.tensors)
    for name in global_shapes(model, head):
        tensor, whole = _read(source, name)
        if name in opened.adapter.targets:
            pair: LocalTensors = {}
            for factor in opened.adapter.factors(name):
                values, piece = _read(opened.tensors, factor)
                pair[factor] = (values, (piece,))
            tensor = report.merge(tensor, whole, opened.adapter, pair)
        is_own_head = name == SCORE and name in opened.tensors.names
        yield name, cast(name, tensor, head_dtype) if is_own_head else tensor


def _read(source: TensorSource, name: str) -> tuple[Tensor, Slice]:
    """Read a tensor, with the slice that is all of it."""
    whole = whole_slice(name, source.shape(name))
    return source.read(whole), whole


def whole_slice(name: str, shape: tuple[int, ...]) -> Slice:
    """Return the slice that is all of a global tensor."""
    return Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
