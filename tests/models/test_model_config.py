"""Reading config.json: both spellings of rope, refusals, the tiny variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spmdrl.models.config import ModelConfig, parse_config, read_config, tiny
from spmdrl.models.family import families
from spmdrl.models.rope import RopeConfig
from spmdrl.models.specs import DenseMlp, MoeMlp

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
}


def rope_of(config: ModelConfig) -> RopeConfig:
    assert config.attention.rope is not None
    return config.attention.rope


def test_old_and_new_rope_spellings_agree() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 1024}
    old = parse_config({**BASE, "rope_scaling": {"type": "yarn", **scaling}})
    without = {key: value for key, value in BASE.items() if key != "rope_theta"}
    new = {"rope_type": "yarn", "rope_theta": 1e6, **scaling}
    assert old == parse_config({**without, "rope_parameters": new})
    rope = rope_of(old)
    assert (rope.theta, rope.kind, rope.factor) == (1e6, "yarn", 4.0)


def test_flags_follow_the_architecture() -> None:
    qwen2 = parse_config(BASE)
    plain = qwen2.attention
    assert (plain.qkv_bias, plain.out_bias, plain.qk_norm, plain.head_dim) == (
        True,
        False,
        "none",
        16,
    )
    assert not qwen2.tie_embeddings
    qwen3 = parse_config({**BASE, "architectures": ["Qwen3ForCausalLM"]})
    plain = qwen3.attention
    assert (plain.qkv_bias, plain.qk_norm, plain.head_dim) == (False, "heads", 128)
    assert qwen3.moe is None


QWEN3_MOE = {
    **BASE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
}


def test_experts_follow_the_architecture() -> None:
    qwen3 = parse_config({**QWEN3_MOE, "norm_topk_prob": True, "mlp_only_layers": [2]})
    assert (qwen3.attention.qk_norm, qwen3.attention.head_dim) == ("heads", 16)
    assert qwen3.moe == MoeMlp(num_experts=16, top_k=4, width=64)
    assert qwen3.moe_layers == (0, 1, 3)
    renamed = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}
    renamed["num_local_experts"] = 16
    every_other = parse_config({**renamed, "decoder_sparse_step": 2})
    assert every_other.moe is not None
    assert (every_other.moe_layers, every_other.moe.normalise) == ((1, 3), False)
    mixtral = parse_config(
        {
            **BASE,
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    assert (mixtral.attention.qk_norm, rope_of(mixtral).theta) == ("none", 1e6)
    assert mixtral.moe == MoeMlp(num_experts=8, top_k=2, width=256)
    assert mixtral.moe_layers == (0, 1, 2, 3)
    for config in (qwen3, mixtral):
        small = tiny(config)
        assert small.moe is not None
        assert (small.moe.num_experts, small.moe.top_k, small.moe_layers) == (8, 2, (0, 1))
        assert parse_config(tiny(config).source) == tiny(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "num_experts"),
        ({"num_local_experts": 8}, "num_local_experts=8 and num_experts=16 contradict"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, not 0"),
        ({"mlp_only_layers": "1"}, "mlp_only_layers"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok must be at most 16, not 17"),
    ],
)
def test_experts_that_are_not_described_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({**QWEN3_MOE, **change})


def test_eos_ids_of_both_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert read_config(tmp_path).eos_ids == (7, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "supported are .*LlamaForCausalLM, .*Mistral"),
        (
            {"architectures": None},
            "there is no architectures, and model_type null is not supported",
        ),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures must be a list"),
        ({"hidden_size": None}, r"config\.json: hidden_size must be a whole number, not null"),
        ({"vocab_size": "264"}, 'vocab_size must be a whole number, not "264"'),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"eos_token_id": "2"}, 'eos_token_id must be a .*, not "2"'),
        ({"bos_token_id": [3, 0]}, "bos_token_id must be a whole number, not a list"),
        ({"eos_token_id": [2, True]}, "eos_token_id must be a "),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the key 'factor' is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: the key 'factor' is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object, not a list"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is an obj"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"head_dim": 15}, "head_dim.*15"),
        ({"model_type": "llama"}, "model_type 'llama' is not that of Qwen2ForCausalLM"),
        ({"is_causal": False}, "is_causal=false"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        (
            {"compression_config": {"format": "float-quantized"}},
            "compression_config.*float weights",
        ),
        ({"quantization": {"bits": 4}}, "quantization="),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list with one text for each"),
        ({"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional' is not supported"),
        (
            {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 6},
            "128.* is not a multiple",
        ),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({**BASE, **change})


@pytest.mark.parametrize("architecture", sorted(families()))
def test_defaults_are_those_of_the_configuration_classes(architecture: str) -> None:
    """Of a public report: Mixtral without `rms_norm_eps` was read with another family's."""
    import transformers

    family = families()[architecture]
    theirs = transformers.CONFIG_MAPPING[family.model_type]()
    config = parse_config({"architectures": [architecture]})
    assert config == parse_config({"model_type": family.model_type})
    assert config.num_layers == theirs.num_hidden_layers
    assert config.vocab_size == theirs.vocab_size
    assert config.norm.eps == theirs.rms_norm_eps


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_original_length_beside_the_rope_counts(kind: str) -> None:
    low_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    scaling = {"rope_type": kind, "factor": 4.0, **low_high}
    beside = {**BASE, "rope_scaling": scaling, "original_max_position_embeddings": 64}
    assert rope_of(parse_config(beside)).original_max_position == 64
    both = {**scaling, "original_max_position_embeddings": 32}
    assert rope_of(parse_config({**beside, "rope_scaling": both})).original_max_position == 64
    alone = {**BASE, "rope_scaling": both}
    assert rope_of(parse_config(alone)).original_max_position == 32
    # the older key, where it says anything, hides the newer one
    plain = {**alone, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    assert rope_of(parse_config(plain)).kind == kind
    assert rope_of(parse_config({**plain, "rope_scaling": None})).theta == 5.0


def test_a_mixture_whose_layers_are_all_dense_has_no_experts() -> None:
    for change in (
        {"mlp_only_layers": [0, 1, 2, 3]},
        {"decoder_sparse_step": 5},
        {"num_experts": 0},
    ):
        assert parse_config({**QWEN3_MOE, **change}).moe is None


def windows(**changes: Any) -> list[int | None]:
    layers = parse_config({**BASE, **changes}).layers
    return [layer.mixer.options.window for layer in layers]  # type: ignore[union-attr]


def test_windows_are_read_layer_by_layer() -> None:
    assert windows(use_sliding_window=False, sliding_window=512) == [None] * 4
    used = {"use_sliding_window": True, "sliding_window": 512}
    assert windows(**used) == [None] * 4  # the first 28 layers see all
    assert windows(**used, max_window_layers=2) == [None, None, 512, 512]
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(**used, layer_types=kinds) == [512, None, 512, None]
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert windows(**mistral, sliding_window=None) == [None] * 4
    assert windows(**mistral) == [4096] * 4  # the class's default
    moe = {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 100}
    assert windows(**moe) == [100] * 4


def test_biases_and_activations_are_read() -> None:
    llama = {**BASE, "architectures": ["LlamaForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}
    config = parse_config({**llama, "attention_bias": True, "mlp_bias": True})
    assert (config.attention.qkv_bias, config.attention.out_bias) == (True, True)
    assert config.layers[0].mlp == DenseMlp(width=256, activation="gelu_pytorch_tanh", bias=True)


@pytest.mark.parametrize(
    ("model_type", "pad"), [("gemma2", 0), ("olmo2", 1), ("phi3", 32000), ("llama", None)]
)
def test_padding_is_the_class_s_where_the_file_does_not_name_it(
    model_type: str, pad: int | None
) -> None:
    assert parse_config({"model_type": model_type}).pad_id == pad
    assert parse_config({"model_type": model_type, "pad_token_id": 7}).pad_id == 7
    assert parse_config({"model_type": model_type, "pad_token_id": None}).pad_id is None


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


def test_tiny_keeps_architecture_vocabulary_and_rope() -> None:
    config = parse_config(BASE)
    small = tiny(config)
    assert (small.num_layers, small.hidden_size, small.attention.head_dim) == (2, 64, 32)
    assert (small.vocab_size, rope_of(small)) == (1000, rope_of(config))
    assert small.attention.qkv_bias
    assert parse_config(small.source) == small
