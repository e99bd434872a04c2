"""Reading config.json: both spellings of rope, refusals, the tiny variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spmdrl.models.config import parse_config, read_config, tiny
from spmdrl.models.experts import MoeConfig
from spmdrl.models.families import DEFAULTS, MODEL_TYPES, SUPPORTED

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


def test_old_and_new_rope_spellings_agree() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 1024}
    old = parse_config({**BASE, "rope_scaling": {"type": "yarn", **scaling}})
    without = {key: value for key, value in BASE.items() if key != "rope_theta"}
    new = {"rope_type": "yarn", "rope_theta": 1e6, **scaling}
    assert old == parse_config({**without, "rope_parameters": new})
    assert old.rope.theta == 1e6 and old.rope.kind == "yarn" and old.rope.factor == 4.0


def test_flags_follow_the_architecture() -> None:
    qwen2 = parse_config(BASE)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim, qwen2.tie_embeddings) == (
        True,
        False,
        16,
        False,
    )
    qwen3 = parse_config({**BASE, "architectures": ["Qwen3ForCausalLM"]})
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
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
    assert (qwen3.qk_norm, qwen3.head_dim) == (True, 16)
    assert qwen3.moe == MoeConfig(
        num_experts=16, top_k=4, intermediate_size=64, normalise=True, layers=(0, 1, 3)
    )
    renamed = {**QWEN3_MOE, "num_local_experts": 16, "num_experts": None}
    every_other = parse_config({**renamed, "decoder_sparse_step": 2}).moe
    assert every_other is not None
    assert (every_other.layers, every_other.normalise) == ((1, 3), False)
    mixtral = parse_config(
        {
            **BASE,
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    assert (mixtral.qk_norm, mixtral.rope.theta) == (False, 1e6)
    assert mixtral.moe == MoeConfig(
        num_experts=8, top_k=2, intermediate_size=256, normalise=True, layers=(0, 1, 2, 3)
    )
    for config in (qwen3, mixtral):
        small = tiny(config).moe
        assert small is not None
        assert (small.num_experts, small.top_k, small.layers) == (8, 2, (0, 1))
        assert parse_config(tiny(config).source) == tiny(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "num_experts must be a whole number, not null"),
        ({"num_local_experts": 8}, "num_local_experts=8 and num_experts=16 contradict"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, not 0"),
        ({"mlp_only_layers": "1"}, "mlp_only_layers must be a list of whole numbers"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 must be between 1 and .*16"),
        ({"use_sliding_window": True, "sliding_window": 100}, "window 100"),
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
        ({"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "architecture None is not supported"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures must be a list"),
        ({"hidden_size": None}, r"config\.json: hidden_size must be a whole number, not null"),
        ({"vocab_size": "264"}, 'vocab_size must be a whole number, not "264"'),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number, not null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"eos_token_id": "2"}, 'eos_token_id must be a token id.* not "2"'),
        ({"bos_token_id": [3, 0]}, "bos_token_id must be a whole number, not a list"),
        ({"eos_token_id": [2, True]}, "eos_token_id must be a token id"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the key 'factor' is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: the key 'factor' is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object, not a list"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is an obj"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"head_dim": 15}, "head_dim=15 .* is not even"),
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
        ({"layer_types": ["sliding_attention"] * 4}, "give no window"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2}, "window 512"),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}, "window 4096"),
        (
            {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 6},
            "hidden_size=128 is no",
        ),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({**BASE, **change})


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_defaults_are_those_of_the_configuration_classes(architecture: str) -> None:
    """Of a public report: Mixtral without `rms_norm_eps` was read with another family's."""
    import transformers

    family = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")
    theirs = family()
    assert family.model_type == MODEL_TYPES[architecture]
    optional = {"rope_scaling", "rope_parameters", "eos_token_id", "bos_token_id"}
    absent = {"attention_bias", "mlp_bias", "sliding_window", "head_dim"}
    for key, ours in DEFAULTS[architecture].items():
        if key == "rope_theta":
            assert family.default_theta == ours
        elif key in optional:
            assert ours is None
        elif ours is None and key in ("head_dim", "num_key_value_heads", "mlp_only_layers"):
            continue  # made of other keys: compared with logits elsewhere
        elif key == "sliding_window" and hasattr(theirs, "use_sliding_window"):
            assert family(use_sliding_window=True).sliding_window == ours
        elif key == "layer_types" or (key in absent and not hasattr(theirs, key)):
            assert not ours
        else:
            assert getattr(theirs, key) == ours, key
    wide = {"num_attention_heads": 32, "architectures": [architecture]}
    config = parse_config({**wide, "max_position_embeddings": 4096})
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.rms_norm_eps == theirs.rms_norm_eps


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_the_original_length_beside_the_rope_counts(kind: str) -> None:
    low_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    scaling = {"rope_type": kind, "factor": 4.0, **low_high}
    beside = {**BASE, "rope_scaling": scaling, "original_max_position_embeddings": 64}
    assert parse_config(beside).rope.original_max_position == 64
    both = {**scaling, "original_max_position_embeddings": 32}
    assert parse_config({**beside, "rope_scaling": both}).rope.original_max_position == 64
    alone = {**BASE, "rope_scaling": both}
    assert parse_config(alone).rope.original_max_position == 32
    # the older key, where it says anything, hides the newer one
    plain = {**alone, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    assert parse_config(plain).rope.kind == kind
    assert parse_config({**plain, "rope_scaling": None}).rope.theta == 5.0


def test_a_mixture_whose_layers_are_all_dense_has_no_experts() -> None:
    for change in (
        {"mlp_only_layers": [0, 1, 2, 3]},
        {"decoder_sparse_step": 5},
        {"num_experts": 0},
    ):
        assert parse_config({**QWEN3_MOE, **change}).moe is None


def test_inactive_sliding_windows_are_accepted() -> None:
    parse_config({**BASE, "use_sliding_window": False, "sliding_window": 512})
    parse_config({**BASE, "use_sliding_window": True, "sliding_window": 512})
    mistral = {**BASE, "architectures": ["MistralForCausalLM"]}
    parse_config({**mistral, "sliding_window": None, "max_position_embeddings": 32768})
    parse_config(mistral)  # the default window of 4096 is not shorter than the context


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


def test_tiny_keeps_architecture_vocabulary_and_rope() -> None:
    config = parse_config(BASE)
    small = tiny(config)
    assert (small.num_layers, small.hidden_size, small.head_dim) == (2, 64, 32)
    assert (small.vocab_size, small.rope, small.qkv_bias) == (1000, config.rope, True)
    assert parse_config(small.source) == small
