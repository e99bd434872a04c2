"""GGUF files of the llama architecture to Hugging Face directories in float32."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ..files import atomic_directory
from .config import ModelConfig, parse_config
from .export import save_pretrained

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


def convert_gguf(gguf_path: str | Path, out_dir: str | Path) -> ModelConfig:
    """Write a Hugging Face directory of a llama-architecture GGUF file; atomically.

    The quantised values are kept exactly (float32), the rows of q and k put back into Hugging
    Face's order, and the tokenizer is rebuilt from the file's vocabulary and merges.

    Raises:
        ValueError: no readable GGUF file, another architecture, or a feature not converted here.
        OSError: `out_dir` could not be written.
    """
    path = Path(gguf_path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no readable GGUF file: {error}") from error
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    source = _config_source(fields, [t.name for t in reader.tensors], path)
    config = parse_config(source, origin=str(path))
    tokenizer = build_tokenizer(fields, path)
    target = Path(out_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tokenizer")
    try:
        with atomic_directory(scratch) as directory:
            tokenizer.save(str(directory / "tokenizer.json"))
            content = json.dumps(tokenizer_config(fields), indent=2)
            (directory / "tokenizer_config.json").write_text(content + "\n", encoding="utf-8")
        save_pretrained(_tensors(reader, config), config, target, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return config


def find_packaged_gguf(package: str) -> Path:
    """The .gguf in an installed package, a wheel (unpacked beside it), or a directory of either.

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


def _config_source(fields: dict[str, Any], tensors: list[str], path: Path) -> dict[str, Any]:
    """config.json's content of GGUF's `llama.*` keys."""
    if fields["general.architecture"] != "llama":
        raise ValueError(
            f"{path}: GGUF architecture {fields['general.architecture']!r} is not supported; "
            "supported is llama (use the model's Hugging Face directory instead)"
        )
    if "llama.rope.scaling.type" in fields or "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: scaled rope is not converted from GGUF")
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    head_dim = int(fields.get("llama.rope.dimension_count", hidden // heads))
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    ids = {
        f"{kind}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id")
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        # GGUF keeps a float32; the shortest decimal of it is the number that was meant.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **{key: int(value) for key, value in ids.items() if value is not None},
    }


def build_tokenizer(fields: dict[str, Any], path: Path) -> Tokenizer:
    """Byte-level BPE of GGUF's vocabulary, merges, token types and pre-tokenizer.

    `tokenizer.ggml.pre: smollm` means GPT-2's splits with every digit alone (llama.cpp's
    LLAMA_VOCAB_PRE_TYPE_SMOLLM); without the digit rule numbers get other tokens than in training.
    """
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    splits: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }
    if kind != "gpt2" or pre not in splits:
        raise ValueError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; "
            f"supported are 'gpt2' with {', '.join(splits)}"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits[pre], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    for token, given in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if given in special:
            control = given == TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(token, special=control, normalized=False)])
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's content, chat template included."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(fields["llama.context_length"]),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            content[f"{kind}_token"] = tokens[int(index)]
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        content["chat_template"] = template
    return content


def _tensors(reader: GGUFReader, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for tensor in reader.tensors:
        # A copy where nothing was dequantised: torch wants memory that it may write to.
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = GLOBAL_NAMES.get(tensor.name)
        if name is None:
            _, index, kind, suffix = tensor.name.split(".")
            name = f"model.layers.{index}.{LAYER_NAMES[kind]}.{suffix}"
            if kind in heads:
                values = _unpermute(values, heads[kind])
        yield name, torch.from_numpy(np.ascontiguousarray(values))


def _unpermute(values: Any, heads: int) -> Any:
    """GGUF interleaves the two halves of each q and k head (rope on neighbours); undo it."""
    halves = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
