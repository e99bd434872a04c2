"""Export of trained models as directories that `transformers` or PEFT loads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.config.data_sets import uses_chat
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import agreed
from spmdrl.models.adapters import is_lora_name
from spmdrl.models.files.export import files_dtype, save_pretrained
from spmdrl.models.files.merge import MergeReport, whole_slice
from spmdrl.models.files.peft_export import write_adapter
from spmdrl.models.files.token_texts import tokenizer_ends
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.models.local_shards import LocalTensors, WeightLayout
from spmdrl.models.sharding import SCORE
from spmdrl.role_spec import RoleSpec
from spmdrl.run.assembled import Assembly
from spmdrl.weights.views import full_tensors

log = logging.getLogger(__name__)

Gathered = Iterator[tuple[str, Tensor | None]]
"""Global tensors by name, on the first rank only."""

Named = Iterator[tuple[str, Tensor]]

Held = LocalTensors | None

Wanted = Callable[[str], bool]
"""Whether a global tensor of this name is wanted."""

Take = Callable[[Wanted], Gathered]

Writer = Callable[[Path, Named], None]
"""Writes a directory with these tensors."""

Write = Callable[[Path, Gathered, Writer], None]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def export_models(config: Config, assembly: Assembly, directory: Path) -> None:
    """Write every trained role as a directory that `transformers` or PEFT loads: the policy
    (without one, the first role) as `directory`, each other as `directory_NAME`.

    A role that trains an adapter is written as `checkpoint.export_as` says: the adapter, the whole
    model with the adapter merged into it, or both, and then the adapter as `.._adapter`. Every rank
    calls it.

    Raises:
        OSError: a directory could not be written, on every rank; an older one is untouched.
    """
    directories = model_directories(directory, assembly.trained)
    for name, own in directories.items():
        layout, tensors = assembly.layouts[name], _tensors(assembly, name)

        def take(wanted: Wanted, layout: WeightLayout = layout, held: Held = tensors) -> Gathered:
            return full_tensors(parts_of(layout, wanted), held)

        write_role(config, assembly.specs[name], own, take, _together)


def model_directories(directory: Path, names: Iterable[str]) -> dict[str, Path]:
    """Give each trained role its directory: the policy (without one, the first role) `directory`
    itself, every other one `directory_NAME`.
    """
    every = list(names)
    first = "policy" if "policy" in every else every[0]
    return {
        name: directory if name == first else directory.with_name(f"{directory.name}_{name}")
        for name in every
    }


def write_role(config: Config, spec: RoleSpec, directory: Path, take: Take, write: Write) -> None:
    """Write one role as `checkpoint.export_as` says.

    Args:
        take: returns the global tensors whose names are wanted.
        write: writes a directory of the tensors that `take` returned.

    Raises:
        OSError: a directory could not be written; an older one is untouched.
    """
    if spec.adapter is None:
        write(directory, take(lambda _: True), partial(_write, config, spec))
        return
    kind = config.checkpoint.export_as
    if kind != "adapter":
        added = _whole(take(is_lora_name))
        base = take(lambda name: not is_lora_name(name))
        write(directory, base, partial(_write_merged, config, spec, added))
    if kind != "merged":
        changed = take(lambda name: is_lora_name(name) or name == SCORE)
        beside = adapter_directory(directory) if kind == "both" else directory
        write(beside, changed, partial(_write_adapter, config, spec))


def adapter_directory(directory: Path) -> Path:
    """Return the directory of an adapter whose merged model has `directory`."""
    return directory.with_name(f"{directory.name}_adapter")


def _tensors(assembly: Assembly, name: str) -> Held:
    """Return this rank's tensors of a trained role, on the device or on the host."""
    backend = assembly.trained[name].backend
    if backend is None:
        return None
    held = backend.local_tensors()
    return {n: (assembly.parts.view(t), slices) for n, (t, slices) in held.items()}


def parts_of(layout: WeightLayout, is_wanted: Wanted) -> WeightLayout:
    """Return the layout with only the local tensors that hold wanted global ones."""
    return {
        rank: {
            local: held
            for local, held in table.items()
            if any(is_wanted(piece.name) for piece in held.slices)
        }
        for rank, table in layout.items()
    }


def _whole(gathered: Gathered) -> LocalTensors:
    """Keep whole tensors on the first rank; the result is empty on the others."""
    found: LocalTensors = {}
    for name, tensor in gathered:
        if tensor is not None:
            found[name] = (tensor, (whole_slice(name, tuple(tensor.shape)),))
    return found


def _together(directory: Path, gathered: Gathered, write: Writer) -> None:
    """Write the directory on the first rank with what all ranks gather.

    Raises:
        OSError: it could not be written, on every rank.
    """

    def write_first() -> None:
        try:
            if dist.get_rank() == 0:
                write(directory, present(gathered))
        except (OSError, ValueError) as error:
            raise OSError(f"{directory} could not be written: {error}") from error
        finally:
            # finish the exchange, so that no rank waits for another
            for _ in gathered:
                pass

    agreed(OSError, write_first)


def _write(config: Config, spec: RoleSpec, directory: Path, tensors: Named) -> None:
    ends = tokenizer_ends(load_tokenizer(spec.path), chat=uses_chat(config))
    save_pretrained(
        tensors,
        spec.model,
        directory,
        spec.path,
        head=spec.head,
        dtype=export_dtype(config, spec),
        ends=[end.token for end in ends],
        skipped=spec.skipped,
    )


def _write_adapter(config: Config, spec: RoleSpec, directory: Path, tensors: Named) -> None:
    assert spec.adapter is not None, spec.name
    dtype = _DTYPES.get(config.checkpoint.export_dtype)
    base, head = spec.path, spec.head
    write_adapter(tensors, spec.model, spec.adapter, directory, base=base, head=head, dtype=dtype)


def _write_merged(
    config: Config, spec: RoleSpec, added: LocalTensors, directory: Path, tensors: Named
) -> None:
    """Write the model with its adapter merged into it, rounded once, and log how many elements have
    changed.
    """
    assert spec.adapter is not None, spec.name
    adapter, report = spec.adapter, MergeReport(dtype=export_dtype(config, spec))

    def merge_all() -> Named:
        for name, tensor in tensors:
            if name not in adapter.targets:
                yield name, tensor
                continue
            whole = whole_slice(name, tuple(tensor.shape))
            pair = {factor: added[factor] for factor in adapter.factors(name)}
            yield name, report.merge(tensor, whole, adapter, pair)

    _write(config, spec, directory, merge_all())
    for line in report.lines:
        log.info("%s: %s", directory, line)


def export_dtype(config: Config, spec: RoleSpec) -> torch.dtype:
    """Dtype by `checkpoint.export_dtype`; `auto` is that of the files the role was read from."""
    wanted = config.checkpoint.export_dtype
    if wanted != "auto":
        return _DTYPES[wanted]
    # toy weights come from no file
    return torch.float32 if spec.is_tiny else files_dtype(spec.path, spec.model)


def present(tensors: Gathered) -> Named:
    """Yield the tensors, on the rank that has them."""
    for name, tensor in tensors:
        assert tensor is not None, f"{name} was not gathered on this rank"
        yield name, tensor
