"""Models that the Megatron backend does not compute are refused by name, without megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from training_cases import tiny_config

from spmdrl.models.config import ModelConfig
from spmdrl.models.specs import (
    AttentionOptions,
    DenseMlp,
    GatedDelta,
    LatentAttention,
    MoeMlp,
    NormSpec,
    SharedExperts,
    SoftmaxAttention,
)
from spmdrl.training.megatron.checks import MegatronOptions, check_megatron, plain_model

DELTA = GatedDelta(num_heads=2, num_v_heads=4, head_dim=8, v_dim=8, conv_size=4)
EXPERTS = MoeMlp(num_experts=4, top_k=2, width=16)
DEGREES = {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "ep": 1}


def with_layers(first: Mapping[str, Any] | None = None, **every: Any) -> ModelConfig:
    """A tiny model with changes of all layers' specs, or of the first one's."""
    model = tiny_config()
    layers = [replace(spec, **every) for spec in model.layers]
    layers[0] = replace(layers[0], **(first or {}))
    return replace(model, layers=tuple(layers))


def attention(**changes: Any) -> SoftmaxAttention:
    return replace(tiny_config().attention, **changes)


def latent() -> LatentAttention:
    plain = attention()
    assert plain.rope is not None
    sizes: dict[str, int] = {"num_heads": 4, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "v_dim": 8}
    return LatentAttention(q_rank=None, rope=plain.rope, options=plain.options, **sizes)


LACKS: list[tuple[dict[str, Any], str]] = [
    ({"mixer": DELTA}, "layer 0 of .* gated DeltaNet"),
    ({"first": {"mixer": DELTA}}, "layer 0 of .* gated DeltaNet"),
    ({"mixer": latent()}, "latent attention"),
    ({"mixer": attention(sinks=True)}, "attention sinks"),
    ({"mixer": attention(gate=True)}, "a gate of attention"),
    ({"mixer": attention(out_bias=True)}, "a bias of attention's output"),
    ({"mixer": attention(qk_norm="all")}, "a norm of all heads together"),
    ({"mixer": attention(rope=None)}, "no rope"),
    ({"first": {"mixer": attention(num_kv_heads=4)}}, "layer 1 of .* other heads or rope"),
    ({"norms": "around"}, "norms that lie around its halves"),
    ({"norms": "after"}, "norms that lie after"),
    ({"residual_scale": 0.5}, r"residual_multiplier=0\.5"),
    ({"mlp": DenseMlp(width=48, activation="gelu")}, "the activation gelu"),
    ({"mlp": DenseMlp(width=48, bias=True)}, "biases in its MLP"),
    ({"mlp": replace(EXPERTS, shared=SharedExperts(width=16))}, "a shared expert"),
    ({"mlp": replace(EXPERTS, scores="sigmoid")}, "chosen by sigmoids"),
    ({"mlp": replace(EXPERTS, form="stacked")}, "experts of another kind"),
    ({"mlp": replace(EXPERTS, scale=2.0)}, "experts of another kind"),
]


@pytest.mark.parametrize(("changes", "words"), LACKS)
def test_layers_that_megatron_lacks_are_refused(changes: dict[str, Any], words: str) -> None:
    start = r"roles\.critic\.train\.backend=megatron: .*"
    with pytest.raises(ValueError, match=f"{start}{words}.*: set roles.critic.train.backend=torch"):
        check_megatron("critic", with_layers(**changes), DEGREES, MegatronOptions())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedding_scale": 8.0}, "scaled embeddings"),
        ({"logit_scale": 0.5}, "scaled logits"),
        ({"logit_softcap": 30.0}, "a soft cap of its logits"),
        ({"norm": NormSpec(eps=1e-6, one_plus=True)}, r"norms by 1 \+ w"),
    ],
)
def test_bodies_that_megatron_lacks_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"megatron: Qwen3ForCausalLM has {words}"):
        plain_model("policy", replace(tiny_config(), **changes))


def test_options_of_attention_and_experts_of_the_usual_kind_are_taken() -> None:
    options = AttentionOptions(scale=0.5, window=4, softcap=20.0)
    model = with_layers({"mixer": attention(options=options)}, mlp=EXPERTS)
    assert plain_model("policy", model).num_heads == 4
