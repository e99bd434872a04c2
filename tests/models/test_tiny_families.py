"""Tiny models of every family: small, whole, and divisible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from spmdrl.commands.small_run import small_model
from spmdrl.models.attention import PackedAttention, make_kernel
from spmdrl.models.config import ModelConfig, parse_config, resized, tiny
from spmdrl.models.decoder import Decoder
from spmdrl.models.degrees import check_tp
from spmdrl.models.family import families
from spmdrl.models.files.hf import RandomCheckpoint
from spmdrl.models.layer_attention import attention_options
from spmdrl.models.sharding import global_shapes
from spmdrl.models.spans import Span
from spmdrl.models.specs import DenseMlp, MoeMlp
from tiny_model import load_into


def usual(architecture: str, **changes: Any) -> ModelConfig:
    """The family's model with the sizes that its class has by default."""
    model_type = families()[architecture].model_type
    return parse_config({"architectures": [architecture], "model_type": model_type, **changes})


def kinds(model: ModelConfig) -> set[tuple[type, type]]:
    return {(type(spec.mixer), type(spec.mlp)) for spec in model.layers}


@pytest.mark.parametrize("architecture", families())
def test_a_tiny_model_is_a_small_model_of_the_family(architecture: str) -> None:
    model = usual(architecture)
    small = tiny(model)
    assert small.family is model.family and small.hidden_size == 64
    assert 2 <= small.num_layers <= 4 and small.vocab_size == model.vocab_size
    # the first layers may be dense, or have experts only
    assert {mixer for mixer, _ in kinds(small)} == {mixer for mixer, _ in kinds(model)}
    assert (small.moe is None) == (model.moe is None)
    shapes = global_shapes(small).items()
    in_layers = sum(math.prod(shape) for name, shape in shapes if ".layers." in name)
    assert in_layers < 600_000

    made = resized(small, {"vocab_size": 264})
    decoder = Decoder(made, device="cpu")
    load_into(decoder, RandomCheckpoint(made, 0))
    tokens = torch.arange(6)
    attend = PackedAttention(
        [Span(q_start=0, q_stop=6, own=(0, 6))],
        make_kernel("blocked"),
        options=attention_options(made),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        hidden = decoder(tokens, tokens, attend)
    assert hidden.isfinite().all() and hidden.std() > 0.1


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("architecture", families())
def test_degrees_divide_a_small_model(architecture: str, tp: int, ep: int) -> None:
    small = small_model(usual(architecture), tp, ep)
    check_tp(small, tp, ep=1 if small.moe is None else ep)
    assert kinds(small) == kinds(tiny(usual(architecture)))


def test_a_small_model_has_as_many_rope_factors_as_its_heads_need() -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
    source = {"rope_scaling": rope, "original_max_position_embeddings": 4096}
    small = small_model(usual("Phi3ForCausalLM", max_position_embeddings=131072, **source), 2, 1)
    assert small.attention.rope is not None
    assert len(small.attention.rope.factors) == small.attention.head_dim // 2


@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe", "Qwen3Next"])
def test_a_tiny_model_has_experts_in_layers_that_are_dense_in_the_model(family: str) -> None:
    model = usual(f"{family}ForCausalLM", decoder_sparse_step=2, mlp_only_layers=[1, 3])
    assert {type(spec.mlp) for spec in model.layers[:6]} == {DenseMlp, MoeMlp}
    assert {type(spec.mlp) for spec in tiny(model).layers} == {MoeMlp}
