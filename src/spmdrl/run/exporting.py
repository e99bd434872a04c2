"""Export of trained models as directories that `transformers` loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.config.data_sets import uses_chat
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import agreed
from spmdrl.models.files.export import files_dtype, save_pretrained
from spmdrl.models.files.token_texts import tokenizer_ends
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.role_spec import RoleSpec
from spmdrl.run.assembled import Assembly
from spmdrl.weights.views import full_tensors

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def export_models(config: Config, assembly: Assembly, directory: Path) -> None:
    """Write every trained role as a directory that `transformers` loads: the policy (without one,
    the first role) as `directory`, each other as `directory_NAME`. Every rank calls it.

    Raises:
        OSError: a directory could not be written, on every rank; an older one is untouched.
    """
    trained = assembly.trained
    first = "policy" if "policy" in trained else next(iter(trained))
    for name in trained:
        own = directory.with_name(f"{directory.name}_{name}")
        _export(config, assembly, assembly.specs[name], directory if name == first else own)


def _export(config: Config, assembly: Assembly, spec: RoleSpec, directory: Path) -> None:
    backend = assembly.trained[spec.name].backend
    tensors = None
    if backend is not None:
        held = backend.local_tensors()
        tensors = {n: (assembly.parts.view(t), slices) for n, (t, slices) in held.items()}
    gathered = full_tensors(assembly.layouts[spec.name], tensors)

    def write() -> None:
        try:
            if dist.get_rank() == 0:
                _write(config, spec, directory, _present(gathered))
        except (OSError, ValueError) as error:
            raise OSError(f"{directory} could not be written: {error}") from error
        finally:
            # finish the exchange, so that no rank waits for another
            for _ in gathered:
                pass

    agreed(OSError, write)


def _write(
    config: Config, spec: RoleSpec, directory: Path, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    ends = tokenizer_ends(load_tokenizer(spec.path), chat=uses_chat(config))
    save_pretrained(
        tensors,
        spec.model,
        directory,
        spec.path,
        head=spec.head,
        dtype=export_dtype(config, spec),
        ends=[end.token for end in ends],
    )


def export_dtype(config: Config, spec: RoleSpec) -> torch.dtype:
    """Dtype by `checkpoint.export_dtype`; `auto` is that of the files the role was read from."""
    wanted = config.checkpoint.export_dtype
    if wanted != "auto":
        return _DTYPES[wanted]
    # toy weights come from no file
    return torch.float32 if spec.is_tiny else files_dtype(spec.path, spec.model)


def _present(tensors: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        assert tensor is not None, f"{name} was not gathered on this rank"
        yield name, tensor
