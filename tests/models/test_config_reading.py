"""config.json as transformers' configuration classes have it, and errors that name its keys."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from spmdrl.models.config_reading import (
    causal_architecture,
    model_type_of,
    resolved,
    resolved_fields,
    text_source,
)
from spmdrl.models.rope import parse_rope, rope_parameters

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}


def test_derived_values_and_defaults_are_those_of_the_class() -> None:
    source = {**BASE, "layer_types": None, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    fields = resolved_fields({**source, "own": [1]}, "gemma3_text", "config.json")
    kinds = ("sliding_attention", "full_attention")
    assert fields.value("layer_types") == ["sliding_attention"] * 4
    assert fields.value("own") == [1] and fields.integer("head_dim") == 256
    assert "head_dim" not in fields and "hidden_size" in fields
    given = rope_parameters(fields, kinds)
    sliding, full = (given[kind] for kind in kinds)
    assert sliding is not None and full is not None
    ropes = [parse_rope(one, max_position=64, head_dim=16) for one in (sliding, full)]
    assert [(rope.kind, rope.theta) for rope in ropes] == [("default", 1e4), ("linear", 1e6)]
    with pytest.raises(ValueError, match="the default, as the file does not have it"):
        fields.integer("query_pre_attn_scalar", 1000)


def test_older_keys_of_rope_are_in_the_parameters() -> None:
    lists = {"short_factor": [1.0] * 6, "long_factor": [1.0] * 6}
    source = {**BASE, "rope_scaling": {"type": "longrope", **lists}, "partial_rotary_factor": 0.75}
    fields = resolved_fields({**source, "rope_theta": 7.0}, "phi3", "config.json")
    (given,) = rope_parameters(fields).values()
    assert given is not None
    rope = parse_rope(given, max_position=8192, head_dim=16, partial=True)
    assert (rope.kind, rope.theta, rope.partial, rope.limit) == ("longrope", 7.0, 0.75, 4096)


def test_both_names_of_a_value_exist_and_the_source_stays() -> None:
    source = {**BASE, "n_routed_experts": 16, "dtype": "bfloat16", "id2label": {"0": "a"}}
    values = resolved(source, "deepseek_v3", "config.json")
    assert values["num_local_experts"] == values["n_routed_experts"] == 16
    assert values["dtype"] == "bfloat16" and values["id2label"] == {"0": "a"}
    rope = {"rope_type": "default"}
    resolved({**BASE, "rope_parameters": rope}, "llama", "config.json")
    assert rope == {"rope_type": "default"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be a whole number, not null"),
        ({"vocab_size": "264"}, 'vocab_size must be a whole number, not "264"'),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number with a decimal point, not null"),
        ({"eos_token_id": "2"}, 'eos_token_id must be a token id.* not "2"'),
        ({"bos_token_id": [3, 0]}, "bos_token_id must be a whole number, not a list"),
        (
            {"tie_word_embeddings": "false"},
            'tie_word_embeddings must be true or false, not "false"',
        ),
        ({"hidden_act": 3}, "hidden_act must be a text, not 3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the key 'factor' is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object, not a list"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list with one text for each"),
        ({"layer_types": ["strange"] * 4}, "transformers refuses its values: .*layer_type"),
        ({"mlp_only_layers": "1"}, 'mlp_only_layers must be a list of whole numbers, not "1"'),
        ({"num_experts": 2, "num_local_experts": 3}, "num_local_experts=3 and num_experts=2 contr"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
        resolved({**BASE, **change}, "qwen3_moe", "config.json")


def test_types_and_architectures() -> None:
    def of(**source: Any) -> str:
        return model_type_of(source, "config.json")

    assert of(model_type="gpt_oss") == "gpt_oss"
    assert of(architectures=["Qwen3ForSequenceClassification"]) == "qwen3"
    kimi = of(model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"])
    assert kimi == "deepseek_v3" and causal_architecture(kimi, "config.json").startswith("Deepseek")
    for strange in ({}, {"architectures": ["Strange"]}, {"architectures": "Strange"}):
        with pytest.raises(ValueError, match=r"^config.json: architectures"):
            of(**strange)
    with pytest.raises(ValueError, match="no configuration of model_type 'strange'"):
        resolved(BASE, of(model_type="strange"), "config.json")
    with pytest.raises(ValueError, match="no language model of type 'strange'"):
        causal_architecture("strange", "config.json")


def test_the_text_part_of_a_larger_model() -> None:
    assert text_source(BASE, "config.json") is BASE
    whole = {"model_type": "gemma3", "text_config": {"hidden_size": 64}}
    part = text_source(whole, "config.json")
    assert part == {"hidden_size": 64, "model_type": "gemma3_text"}


def test_the_library_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("transformers").level
    strange = {"rope_type": "linear", "factor": 0.5, "strange": 1}
    resolved({**BASE, "rope_scaling": strange, "eos_token_id": 1000}, "llama", "config.json")
    assert not caplog.records and logging.getLogger("transformers").level == level
