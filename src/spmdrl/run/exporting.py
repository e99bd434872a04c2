"""Export of trained models as directories that `transformers` or PEFT loads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
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
    trained = assembly.trained
    first = "policy" if "policy" in trained else next(iter(trained))
    kind = config.checkpoint.export_as
    for name in trained:
        spec, tensors = assembly.specs[name], _tensors(assembly, name)
        layout = assembly.layouts[name]
        own = directory if name == first else directory.with_name(f"{directory.name}_{name}")
        if spec.adapter is None:
            _together(own, full_tensors(layout, tensors), partial(_write, config, spec))
            continue
        if kind != "adapter":
            added = _whole(parts_of(layout, is_lora_name), tensors)
            base = full_tensors(parts_of(layout, lambda n: not is_lora_name(n)), tensors)
            _together(own, base, partial(_write_merged, config, spec, added))
        if kind != "merged":
            changed = parts_of(layout, lambda n: is_lora_name(n) or n == SCORE)
            beside = own.with_name(f"{own.name}_adapter") if kind == "both" else own
            _together(beside, full_tensors(changed, tensors), partial(_write_adapter, config, spec))


def _tensors(assembly: Assembly, name: str) -> LocalTensors | None:
    """Return this rank's tensors of a trained role, on the device or on the host."""
    backend = assembly.trained[name].backend
    if backend is None:
        return None
    held = backend.local_tensors()
    return {n: (assembly.parts.view(t), slices) for n, (t, slices) in held.items()}


def parts_of(layout: WeightLayout, is_wanted: Callable[[str], bool]) -> WeightLayout:
    """Return the layout with only the local tensors that hold wanted global ones."""
    return {
        rank: {
            local: held
            for local, held in table.items()
            if any(is_wanted(piece.name) for piece in held.slices)
        }
        for rank, table in layout.items()
    }


def _whole(layout: WeightLayout, tensors: LocalTensors | None) -> LocalTensors:
    """Gather whole tensors on the first rank; the result is empty on the others."""
    found: LocalTensors = {}
    for name, tensor in full_tensors(layout, tensors):
        if tensor is not None:
            found[name] = (tensor, (whole_slice(name, tuple(tensor.shape)),))
    return found


def _together(directory: Path, gathered: Gathered, write: Callable[[Path, Named], None]) -> None:
    """Write the directory on the first rank with what all ranks gather.

    Raises:
        OSError: it could not be written, on every rank.
    """

    def write_first() -> None:
        try:
            if dist.get_rank() == 0:
                write(directory, _present(gathered))
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


def _present(tensors: Gathered) -> Named:
    for name, tensor in tensors:
        assert tensor is not None, f"{name} was not gathered on this rank"
        yield name, tensor
