"""Conversion of GGUF files to Hugging Face directories in float32."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

from spmdrl.atomic_files import atomic_directory
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.fields import Fields, refuse_pointer
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.gguf_architectures import (
    GLOBAL_NAMES,
    GgufArchitecture,
    architecture_of,
    config_source,
)
from spmdrl.models.files.gguf_tokenizer import build_tokenizer, tokenizer_config
from spmdrl.models.sharding import global_shapes


class _Reader(GGUFReader):  # type: ignore[misc]
    """A reader that refuses to read beyond the file's end: the library's own reader returns what is
    left, and loops over arrays of any length that a damaged file claims.
    """

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if not int(offset) <= end <= len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and byte {end} is asked for")
        return super()._get(offset, dtype, count, override_order)


def convert_gguf(gguf_path: str | Path, out_dir: str | Path) -> ModelConfig:
    """Write a GGUF file as a Hugging Face directory, atomically.

    The quantised values are kept exactly (float32), what llama.cpp changed of them is undone, and
    the tokenizer is rebuilt from the file's vocabulary and its merges or scores.

    Raises:
        ValueError: the file is not a readable GGUF file, has another architecture, or a key or
            tensor that is not converted; the message names it.
        OSError: `out_dir` could not be written.
    """
    path = Path(gguf_path)
    reader, fields = _read(path)
    architecture = architecture_of(fields)
    model = parse_config(config_source(fields, [t.name for t in reader.tensors]), origin=str(path))
    names = _tensor_names(reader, model, architecture, path)
    try:
        tokenizer = build_tokenizer(fields)
        described = tokenizer_config(fields)
    # the library raises bare Exceptions, which do not name the file
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        named = text if str(path) in text else f"{path}: tokenizer.ggml makes no tokenizer: {text}"
        raise ValueError(named) from error
    target = Path(out_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tokenizer")
    try:
        with atomic_directory(scratch) as directory:
            tokenizer.save(str(directory / "tokenizer.json"))
            content = json.dumps(described, indent=2)
            (directory / "tokenizer_config.json").write_text(content + "\n", encoding="utf-8")
        tensors = _tensors(reader, names, model, architecture, path)
        save_pretrained(tensors, model, target, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return model


def _read(path: Path) -> tuple[GGUFReader, Fields]:
    """Open the file, and read the values of its keys."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    refuse_pointer(path)
    try:
        reader = _Reader(path)
        values = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
    # a damaged file makes the library raise errors of any kind, none of which names it
    except Exception as error:
        raise ValueError(
            f"{path} is no readable GGUF file: {type(error).__name__}: {error}"
        ) from error
    return reader, Fields(values=values, origin=str(path))


def _tensor_names(
    reader: GGUFReader, model: ModelConfig, architecture: GgufArchitecture, path: Path
) -> dict[str, str]:
    """Map GGUF's name of every tensor to Hugging Face's.

    Raises:
        ValueError: a tensor is not converted, missing or of another shape.
    """
    shapes, layer_names = global_shapes(model), architecture.layer_names
    names = {}
    for tensor in reader.tensors:
        name = GLOBAL_NAMES.get(tensor.name)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match is not None and match[2] in layer_names:
            name = f"model.layers.{match[1]}.{layer_names[match[2]]}.weight"
        if name not in shapes:
            raise ValueError(
                f"{path}: the tensor {tensor.name!r} is not converted from GGUF (a model of "
                f"{model.num_layers} layers without biases and experts is)"
            )
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shape != shapes[name]:
            raise ValueError(
                f"{path}: the tensor {tensor.name!r} has shape {shape}, the file's keys ask for "
                f"{shapes[name]}"
            )
        names[tensor.name] = name
    missing = sorted(shapes.keys() - set(names.values()))
    if missing:
        raise ValueError(f"{path} has no tensor for {missing[0]!r}")
    return names


def _tensors(
    reader: GGUFReader,
    names: dict[str, str],
    model: ModelConfig,
    architecture: GgufArchitecture,
    path: Path,
) -> Iterator[tuple[str, Tensor]]:
    heads = {}
    if architecture.is_permuted:
        heads = {"q_proj": model.attention.num_heads, "k_proj": model.attention.num_kv_heads}
    for tensor in reader.tensors:
        try:
            # This copies if nothing was dequantised, because torch needs writable memory.
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        # the kind of error differs between the formats that the library does not know
        except Exception as error:
            raise ValueError(f"{path}: the tensor {tensor.name!r}: {error}") from error
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise ValueError(f"{path}: the tensor {tensor.name!r} holds NaN or infinity")
        name = names[tensor.name]
        count = next((count for kind, count in heads.items() if f".{kind}." in name), None)
        if count is not None:
            values = _unpermute(values, count)
        if architecture.one_plus and values.ndim == 1:
            values = values - 1
        yield name, torch.from_numpy(np.ascontiguousarray(values))


def _unpermute(values: Any, heads: int) -> Any:
    """Undo GGUF's interleaving of the two halves of each q and k head (rope on neighbours)."""
    halves = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
