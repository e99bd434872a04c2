"""Hugging Face directories that `transformers` loads, written in one piece.

No tensor is held in memory after the next came.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import atomic_directory
from .config import ModelConfig
from .families import CAUSAL, CLASSIFICATION

from .shard_files import write_shards
from .sharding import Head, global_shapes
from .weight_files import INDEX, SINGLE

MAX_SHARD_BYTES = 4 * 1024**3

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def save_pretrained(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    out_dir: str | Path,
    tokenizer_dir: str | Path | None,
    *,
    head: Head = "lm",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a directory that `transformers` loads; no tensor is held in memory after the next came.

    A model with a scalar head is one for sequence classification with one label.

    Args:
        tensors: every global tensor once, by Hugging Face name, in any order, on any device.
        tokenizer_dir: where tokenizer files and generation_config.json are copied from.

    Raises:
        OSError: a file could not be written; an older `out_dir` is then as it was.
        ValueError: a tensor is missing, unknown, given twice or of another shape.
    """
    with atomic_directory(out_dir) as fresh:
        shapes = global_shapes(config, head)
        dtype = _write_weights(_checked(tensors, shapes), shapes, fresh, max_shard_bytes)
        source = {**_without_labels(config.source), **_described(config, head), "dtype": dtype}
        _write_json(fresh / "config.json", source)
        if tokenizer_dir is not None:
            _copy_files(Path(tokenizer_dir), fresh)
        if not (fresh / "generation_config.json").exists():
            keys = ("bos_token_id", "eos_token_id", "pad_token_id")
            given = {key: source[key] for key in keys if source.get(key) is not None}
            _write_json(fresh / "generation_config.json", given)


def _described(config: ModelConfig, head: Head) -> dict[str, Any]:
    """What config.json says of the head."""
    if head == "lm":
        return {"architectures": [config.architecture]}
    described: dict[str, Any] = {
        "architectures": [config.architecture.replace(CAUSAL, CLASSIFICATION)],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
    }
    # transformers reads a padded row's score at the last token that is no padding
    if config.source.get("pad_token_id") is None and config.eos_ids:
        described["pad_token_id"] = config.eos_ids[0]
    return described


def _without_labels(source: dict[str, Any]) -> dict[str, Any]:
    gone = ("torch_dtype", "id2label", "label2id", "num_labels", "problem_type")
    return {key: value for key, value in source.items() if key not in gone}


def _checked(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    open_names = dict(shapes)
    for name, tensor in tensors:
        shape = open_names.pop(name, None)
        if shape is None:
            raise ValueError(f"{name!r} is no tensor of this model, or was given twice")
        if shape != tuple(tensor.shape):
            raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, the model's is {shape}")
        yield name, tensor
    if open_names:
        raise ValueError(f"tensor {min(open_names)!r} was not given")


def _write_weights(
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
    max_shard_bytes: int,
) -> str:
    """The weights and, where there are several files, their index; returns the dtype."""
    shards = write_shards(tensors, shapes, directory, max_shard_bytes)
    count = len(shards.names)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = [SINGLE]
    for i, file in enumerate(files):
        (directory / f"{i}.part").rename(directory / file)
    if count > 1:
        pairs = zip(shards.names, files, strict=True)
        weight_map = {name: file for names, file in pairs for name in names}
        index = {"metadata": {"total_size": shards.num_bytes}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)
    return shards.dtype


def _copy_files(source: Path, target: Path) -> None:
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
