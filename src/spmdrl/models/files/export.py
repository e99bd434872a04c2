"""Hugging Face directories that `transformers` loads, written atomically.

No tensor is kept in memory once the next one has arrived.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmdrl.atomic_files import atomic_directory
from spmdrl.models.config import ModelConfig
from spmdrl.models.fields import Fields, read_json
from spmdrl.models.files.model_entries import NEXT_TOKENS
from spmdrl.models.files.padding import keep_padding, set_padding
from spmdrl.models.files.safetensors_writer import write_shards
from spmdrl.models.files.weight_files import INDEX, SINGLE, open_checkpoint
from spmdrl.models.model_classes import CAUSAL, CLASSIFICATION, TOKEN_CLASSIFICATION
from spmdrl.models.quantisation import QUANTIZATION
from spmdrl.models.sharding import Head, buffer_names, global_shapes
from spmdrl.models.tensors import Slice

log = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
MAX_SHARD_BYTES = 4 * 1024**3

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_PREDICTION = (NEXT_TOKENS, "mtp_num_hidden_layers")
MORE_TEMPLATES = "additional_chat_templates"
"""The directory of a tokenizer's templates other than the default one."""


def files_dtype(directory: str | Path, model: ModelConfig) -> torch.dtype:
    """Return the dtype of the embeddings in a directory's files, taken as that of all tensors.

    Raises:
        ValueError: see `open_checkpoint`.
    """
    shape = (model.vocab_size, model.hidden_size)
    row = Slice(name=EMBEDDING, shape=shape, start=(0, 0), stop=(1, shape[1]), offset=0)
    return open_checkpoint(directory).read(row).dtype


def save_pretrained(
    tensors: Iterable[tuple[str, Tensor]],
    model: ModelConfig,
    out_dir: str | Path,
    tokenizer_dir: str | Path | None,
    *,
    head: Head = "lm",
    dtype: torch.dtype | None = None,
    ends: Sequence[int] = (),
    skipped: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a directory that `transformers` loads; no tensor is kept once the next has arrived.

    A model with a scalar head is written as sequence classification with one label. transformers
    reads its score at the last token that is not padding, so the padding token in config.json and
    in the tokenizer is one with which no row ends, or `skipped`. A head with a bias is written as
    token classification, the only one that has it there: its last logit is the score.

    Args:
        tensors: every global tensor once, by Hugging Face name, in any order, on any device.
        tokenizer_dir: directory from which tokenizer files and generation_config.json are copied.
        dtype: dtype of the values in the files; None keeps that of `tensors`. The model's buffers
            are float32 in any case.
        ends: tokens that end a text, in addition to those of `model`.
        skipped: the token that was passed over at the ends of rows, if one was.

    Raises:
        OSError: a file could not be written; an older `out_dir` is then unchanged.
        ValueError: a tensor is missing, unknown, given twice, of another shape, or has values that
            `dtype` cannot hold.
    """
    with atomic_directory(out_dir) as fresh:
        shapes = global_shapes(model, head)
        kept = buffer_names(model)
        narrow = (
            (name, cast(name, tensor, torch.float32 if name in kept else dtype))
            for name, tensor in checked(tensors, shapes)
        )
        written = write_weights(narrow, shapes, fresh, max_shard_bytes)
        source = {**_without_labels(model.source), **_described(model, head), "dtype": written}
        if tokenizer_dir is not None:
            copy_tokenizer(Path(tokenizer_dir), fresh)
            _copy(Path(tokenizer_dir), fresh, "generation_config.json")
        file = fresh / "generation_config.json"
        copied = read_json(file) if file.is_file() else {}
        fields = Fields(values=copied, origin=file.name, defaults={"eos_token_id": None})
        found = dict.fromkeys([*model.eos_ids, *fields.ids("eos_token_id"), *ends])
        all_ends = [token for token in found if 0 <= token < model.vocab_size]
        if head == "score":
            if skipped is None:
                source["pad_token_id"] = set_padding(fresh, model, all_ends)
            else:
                keep_padding(fresh, skipped)
                source["pad_token_id"] = skipped
        write_json(fresh / "config.json", source)
        generation = _generation(copied, source, all_ends, head)
        if generation != copied or not file.is_file():
            write_json(file, generation)


def _generation(
    copied: Mapping[str, Any], source: Mapping[str, Any], ends: Sequence[int], head: Head
) -> dict[str, Any]:
    """Make generation_config.json's content: that of the copied one, with every end of text."""
    keys = ("bos_token_id", "pad_token_id")
    given = {key: source[key] for key in keys if source.get(key) is not None}
    written = {**given, **copied}
    if ends:
        written["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    if head == "score":
        written["pad_token_id"] = source["pad_token_id"]
    return written


def _described(model: ModelConfig, head: Head) -> dict[str, Any]:
    """Return config.json's keys about the head."""
    if head == "lm":
        return {"architectures": [model.architecture]}
    kind = TOKEN_CLASSIFICATION if model.score_bias else CLASSIFICATION
    if model.score_bias:
        log.info(
            "the scalar head has a bias: AutoModelForTokenClassification adds it, and the scores "
            "of AutoModelForSequenceClassification, which has none, are lower by it"
        )
    return {
        "architectures": [model.architecture.replace(CAUSAL, kind)],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
    }


def _without_labels(source: dict[str, Any]) -> dict[str, Any]:
    # transformers cannot load a padding token that has no row in the embedding
    pad, size = source.get("pad_token_id"), source.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and pad >= size:
        source = {**source, "pad_token_id": None}
    # what another class's own code read, which an export does not need
    foreign = ("auto_map", "value_head_prefix", "token_classification_bias")
    labels = ("id2label", "label2id", "num_labels", "problem_type")
    gone = ("torch_dtype", *labels, *foreign, QUANTIZATION)
    # layers for multi-token prediction were left out when the model was read
    source = {**source, **{key: 0 for key in _PREDICTION if source.get(key)}}
    return {key: value for key, value in source.items() if key not in gone}


def checked(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors.

    Raises:
        ValueError: one is missing, unknown, given twice or of another shape than in `shapes`.
    """
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


def write_weights(
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
    max_shard_bytes: int,
) -> str:
    """Write the weights and, if there are several files, their index; return the dtype."""
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
        write_json(directory / INDEX, index)
    return shards.dtype


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files from one directory to another."""
    for name in TOKENIZER_FILES:
        _copy(source, target, name)
    for template in sorted((source / MORE_TEMPLATES).glob("*.jinja")):
        (target / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, target / MORE_TEMPLATES / template.name)


def _copy(source: Path, target: Path, name: str) -> None:
    if (source / name).is_file():
        shutil.copyfile(source / name, target / name)


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the tensor in a dtype, None for its own.

    Raises:
        ValueError: float16 cannot hold one of its values.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(narrow.isfinite(), tensor.isfinite()):
        raise ValueError(
            f"{name} has values of up to {tensor.abs().max().item():.3g}, which float16 cannot "
            "hold: write bfloat16 or float32 (checkpoint.export_dtype, or --dtype of convert)"
        )
    return narrow


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an object with sorted keys."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
