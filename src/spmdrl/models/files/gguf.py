"""Conversion of GGUF files of the llama architecture to Hugging Face directories in float32."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import zipfile
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
from spmdrl.models.files.gguf_tokenizer import (
    build_tokenizer,
    token_id,
    token_list,
    tokenizer_config,
)
from spmdrl.models.sharding import global_shapes

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


_READ = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
)
"""Keys of the architecture that are read, or that have no effect without keys that are refused."""

_ENDS = ("eos", "eot", "eom")
"""The kinds of ids at which llama.cpp ends a text."""


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
    """Write a llama-architecture GGUF file as a Hugging Face directory, atomically.

    The quantised values are kept exactly (float32), the rows of q and k are put back into Hugging
    Face's order, and the tokenizer is rebuilt from the file's vocabulary and merges.

    Raises:
        ValueError: the file is not a readable GGUF file, has another architecture, or a key or
            tensor that is not converted; the message names it.
        OSError: `out_dir` could not be written.
    """
    path = Path(gguf_path)
    reader, fields = _read(path)
    model = parse_config(_config_source(fields, [t.name for t in reader.tensors]), origin=str(path))
    names = _tensor_names(reader, model, path)
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
        save_pretrained(_tensors(reader, names, model, path), model, target, scratch)
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


def find_packaged_gguf(package: str) -> Path:
    """Find the .gguf file: itself, in a package, in a wheel (unpacked next to it), or in a folder.

    Raises:
        ValueError: there is none, or more than one.
    """
    place = Path(package)
    if place.suffix == ".gguf" and place.is_file():
        return place
    if place.is_dir():
        found, wheels = sorted(place.rglob("*.gguf")), sorted(place.glob("*.whl"))
        if not found and len(wheels) == 1:
            return _unpack(wheels[0])
        return _only(found, package)
    if place.suffix == ".whl":
        return _unpack(place)
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package!r} is no installed package, wheel, directory or .gguf file")
    roots = [Path(root) for root in spec.submodule_search_locations]
    return _only(sorted(file for root in roots for file in root.rglob("*.gguf")), package)


def _only(found: list[Path], package: str) -> Path:
    if len(found) != 1:
        names = ", ".join(str(file) for file in found) or "none"
        raise ValueError(f"{package} must hold one .gguf file; found: {names}")
    return found[0]


def _unpack(wheel: Path) -> Path:
    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"{wheel} is no wheel (a zip file)")
    with zipfile.ZipFile(wheel) as archive:
        inside = [Path(name) for name in archive.namelist() if name.endswith(".gguf")]
        name = _only(inside, str(wheel))
        target = wheel.parent / name.name
        if not target.exists():
            part = target.with_suffix(".part")
            with archive.open(name.as_posix()) as packed, part.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            part.rename(target)
    return target


def _config_source(fields: Fields, tensors: list[str]) -> dict[str, Any]:
    """Make config.json's content from GGUF's `llama.*` keys."""
    path, architecture = fields.origin, fields.text("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path}: GGUF architecture {architecture!r} is not supported; "
            "supported is llama (use the model's Hugging Face directory instead)"
        )
    if "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: scaled rope is not converted from GGUF (rope_freqs.weight)")
    _refuse_parts(fields)
    known = {f"llama.{key}" for key in _READ}
    for key in fields.values:
        if key.startswith("llama.") and key not in known:
            raise ValueError(f"{path}: the key {key!r} is not converted from GGUF")
    heads = fields.integer("llama.attention.head_count")
    hidden = fields.integer("llama.embedding_length")
    kv_heads, head_dim = heads, hidden // heads
    if "llama.attention.head_count_kv" in fields:
        kv_heads = fields.integer("llama.attention.head_count_kv")
    if "llama.attention.key_length" in fields:
        head_dim = fields.integer("llama.attention.key_length")
    elif "llama.rope.dimension_count" in fields:
        head_dim = fields.integer("llama.rope.dimension_count")
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if key in fields and fields.integer(key) != head_dim:
            raise ValueError(f"{path}: {key}={fields.value(key)} with heads of {head_dim} values")
    epsilon = fields.number("llama.attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(token_list(fields)),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("llama.feed_forward_length"),
        "num_hidden_layers": fields.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        # GGUF stores a float32; its shortest decimal is the number that was meant.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "max_position_embeddings": fields.integer("llama.context_length"),
        **_rope_source(fields),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **_token_ids(fields),
    }


def _refuse_parts(fields: Fields) -> None:
    """Raise ValueError for a file that is not a complete model, or whose keys disagree."""
    if fields.values.get("general.type", "model") != "model" or "adapter.type" in fields:
        raise ValueError(
            f"{fields.origin}: general.type={fields.values.get('general.type')!r} is no model: "
            "give the file of the model that it belongs to, with an adapter merged into it"
        )
    if "split.count" in fields and fields.integer("split.count", 0) > 1:
        raise ValueError(
            f"{fields.origin} is one of {fields.value('split.count')} parts: join them first "
            "(`llama-gguf-split --merge`)"
        )
    key, count = "llama.vocab_size", len(token_list(fields))
    if key in fields and fields.integer(key) != count:
        raise fields.wrong(key, f"{count}, the number of tokenizer.ggml.tokens")


def _rope_source(fields: Fields) -> dict[str, Any]:
    """Read rope like llama.cpp: without a type the factor is linear, and 0 means no factor."""
    theta = 10000.0
    if "llama.rope.freq_base" in fields:
        theta = fields.number("llama.rope.freq_base", above=0.0)
    key = "llama.rope.scaling.type"
    kind = fields.text(key) if key in fields else "linear"
    if kind not in ("none", "linear"):
        raise ValueError(f"{fields.origin}: scaled rope is not converted from GGUF: {key}={kind!r}")
    factors = ("llama.rope.scaling.factor", "llama.rope.scale_linear")
    given = next((key for key in factors if key in fields), None)
    factor = 1.0 if given is None else fields.number(given, least=0.0) or 1.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    return {"rope_theta": theta, "rope_parameters": rope}


def _token_ids(fields: Fields) -> dict[str, Any]:
    """Make config.json's ids of special tokens."""
    found: dict[str, Any] = {
        f"{kind}_token_id": token_id(fields, key)
        for kind, key in (("bos", "bos"), ("pad", "padding"))
    }
    ends = dict.fromkeys(end for kind in _ENDS if (end := token_id(fields, kind)) is not None)
    if ends:
        found["eos_token_id"] = next(iter(ends)) if len(ends) == 1 else list(ends)
    return {key: value for key, value in found.items() if value is not None}


def _tensor_names(reader: GGUFReader, model: ModelConfig, path: Path) -> dict[str, str]:
    """Map GGUF's name of every tensor to Hugging Face's.

    Raises:
        ValueError: a tensor is not converted, missing or of another shape.
    """
    shapes = global_shapes(model)
    names = {}
    for tensor in reader.tensors:
        name = GLOBAL_NAMES.get(tensor.name)
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match is not None and match[2] in LAYER_NAMES:
            name = f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
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
    reader: GGUFReader, names: dict[str, str], model: ModelConfig, path: Path
) -> Iterator[tuple[str, Tensor]]:
    heads = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads}
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
        yield name, torch.from_numpy(np.ascontiguousarray(values))


def _unpermute(values: Any, heads: int) -> Any:
    """Undo GGUF's interleaving of the two halves of each q and k head (rope on neighbours)."""
    halves = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
