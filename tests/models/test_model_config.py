"""Reading config.json: both spellings of rope, refusals, the tiny variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spmdrl.models.config import parse_config, read_config, tiny
from spmdrl.models.experts import MoeConfig

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
        ({"num_experts": None}, r"keys \['num_experts'\] are missing for Qwen3Moe"),
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
        ({"hidden_size": None}, "keys \\['hidden_size'\\] are missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2}, "window 512"),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}, "window 4096"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({**BASE, **change})


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
