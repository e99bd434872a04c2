"""Latent attention: the absorbed form against the expanded one, and what config.json may say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantised import FP8, block_quantise
from torch import Tensor

from spmdrl.models.adapters import find_targets
from spmdrl.models.blocks.latent_attention import LatentMixer
from spmdrl.models.blocks.projections import Build
from spmdrl.models.config import parse_config, tiny
from spmdrl.models.files.hf import open_model
from spmdrl.models.files.weight_files import SINGLE
from spmdrl.models.low_rank import Applied
from spmdrl.models.low_rank_products import Addition, Span
from spmdrl.models.rope import RopeConfig, inverse_frequencies, make_rope
from spmdrl.models.sharding import global_shapes
from spmdrl.models.specs import AttentionOptions, LatentAttention, NormSpec
from spmdrl.models.tensors import Slice
from tiny_model import make_tiny_model

SPEC = LatentAttention(
    num_heads=3,
    q_rank=5,
    kv_rank=7,
    nope_dim=6,
    rope_dim=4,
    v_dim=8,
    rope=RopeConfig(interleaved=True, original_max_position=64),
    options=AttentionOptions(scale=0.3),
)
SECOND = 4
"""First token of the second row."""

SOURCE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SIZES = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}


class Causal:
    """Attention over two rows, by heads of keys that may be fewer than those of queries."""

    def __init__(self, takes_latents: bool) -> None:
        self.takes_latents = takes_latents
        self.widths: tuple[int, ...] = ()

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        self.widths = (k.shape[1], k.shape[2], v.shape[2])
        k, v = (x.expand(-1, q.shape[1], -1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * SPEC.options.scale
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
        hidden[SECOND:, :SECOND] = True
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


class OneAdapter:
    """Random additions to every projection."""

    def __init__(self, mixer: LatentMixer) -> None:
        self.made: dict[str, Addition] = {}
        for name in ("q_down", "q_up", "kv_down", "kv_up", "out"):
            rows, columns = mixer.get_submodule(name).get_parameter("weight").shape
            span = Span(part=name, key=1, first=0, rows=rows, first_rank=0, rank=2, scale=0.7)
            addition = Addition([span], columns, 0, 1, dtype=torch.float64, device="cpu")
            self.made[f"layers.0.attention.{name}"] = randomised(addition)

    def addition(self, local: str) -> Addition | None:
        return self.made.get(local)


def randomised(module: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def made(spec: LatentAttention) -> LatentMixer:
    build = Build(norm=NormSpec(eps=0.1), dtype=torch.float64, device="cpu")
    mixer: LatentMixer = randomised(LatentMixer(spec, 10, build))
    return mixer


def both_ways(spec: LatentAttention, rows: Tensor | None = None) -> Tensor:
    mixer = made(spec)
    applied = [Applied(weights=OneAdapter(mixer), rows=rows)] if rows is not None else []
    x = torch.randn(9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rope = make_rope(torch.arange(9), torch.tensor(inverse_frequencies(spec.rope, 4)), spec.rope)
    expanded, absorbed = Causal(False), Causal(True)
    with torch.no_grad():
        wanted = mixer(x, rope, expanded, 0, applied)
        found = mixer(x, rope, absorbed, 0, applied)
    assert expanded.widths == (3, 10, 8) and absorbed.widths == (1, 11, 7)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    return wanted


@pytest.mark.parametrize("q_rank", [5, None])
def test_an_engine_computes_with_latent_keys_what_a_trainer_does(q_rank: int | None) -> None:
    both_ways(replace(SPEC, q_rank=q_rank))


def test_adapters_of_some_rows_apply_to_the_absorbed_form() -> None:
    none, some, every = torch.zeros(9, 1), torch.zeros(9, 1), torch.ones(9, 1)
    some[SECOND:] = 1
    found = [both_ways(SPEC, rows.double()) for rows in (none, some, every)]
    plain = both_ways(SPEC)
    torch.testing.assert_close(found[0], plain)
    torch.testing.assert_close(found[1], torch.cat((plain[:SECOND], found[2][SECOND:])))
    assert not torch.allclose(found[2][0], plain[0])


def test_an_adapter_that_is_merged_into_copies_still_applies_to_the_expansion() -> None:
    mixer = made(SPEC)
    [adapter] = [Applied(weights=OneAdapter(mixer), experts_only=True)]
    x = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rope = make_rope(torch.arange(5), torch.tensor(inverse_frequencies(SPEC.rope, 4)), SPEC.rope)
    with torch.no_grad():
        added = mixer(x, rope, Causal(True), 0, [adapter])
        addition = adapter.weights.addition("layers.0.attention.kv_up")
        assert addition is not None
        [b] = addition.b_weights()
        mixer.kv_up.weight += 0.7 * b @ addition.lora_A
        torch.testing.assert_close(added, mixer(x, rope, Causal(True), 0), rtol=1e-6, atol=1e-6)


def test_latent_norms_have_an_epsilon_of_their_own() -> None:
    model = parse_config({**SOURCE, **SIZES, "rms_norm_eps": 0.5})
    mixer = model.layers[0].mixer
    assert isinstance(mixer, LatentAttention) and mixer.norm_eps == 1e-6
    assert model.norm.eps == 0.5
    assert LatentMixer(mixer, 32, Build(norm=model.norm)).kv_down_norm.spec.eps == 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads=4"),
        ({"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method must be 'noaux_tc'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"n_group": 3}, "n_routed_experts=8 is not n_group=3 groups"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most 4"),
        ({"index_topk": 2048}, r"DeepseekV3ForCausalLM has a sparse-attention indexer"),
        (
            {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"},
            r"DeepseekV32ForCausalLM has a sparse-attention indexer \(index_topk\)",
        ),
        (
            {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"},
            "GlmMoeDsaForCausalLM has a sparse-attention indexer",
        ),
        ({"architectures": None, "model_type": "glm_moe_dsa"}, '"glm_moe_dsa" has a sparse-att'),
    ],
)
def test_what_no_block_computes_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_config({**SOURCE, **SIZES, **changes})


def test_files_may_have_a_type_of_their_own() -> None:
    model = parse_config({**SOURCE, **SIZES, "model_type": "kimi_k2", "scoring_func": "sigmoid"})
    assert model == parse_config({**SOURCE, **SIZES})
    assert parse_config({**SOURCE, **SIZES, "architectures": None}) == model
    small = tiny(model)
    assert small.num_layers == 2 and small.moe_layers == (1,)


def test_adapters_take_the_projections_to_and_from_latent_vectors() -> None:
    model = parse_config({**SOURCE, **SIZES})
    names = [name.removesuffix(".weight") for name in find_targets(model, ["attention"])]
    assert [name.rpartition(".")[2] for name in names[:5]] == [
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ]


def test_a_model_in_blocks_of_eight_bits_is_read(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, "DeepseekV3ForCausalLM", **SIZES)
    weights = load_file(tmp_path / SINGLE)
    plain = dict(weights)
    for name in plain:
        if "_proj" in name:
            weights[name], weights[f"{name}_scale_inv"] = block_quantise(plain[name], 16, 8)
    save_file(weights, tmp_path / SINGLE, metadata={"format": "pt"})
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "quantization_config": FP8}))
    read, source = open_model(tmp_path)
    assert read.layers == model.layers
    for name, shape in global_shapes(read).items():
        whole = Slice(name=name, shape=shape, start=(0,) * len(shape), stop=shape, offset=0)
        found = source.read(whole)
        torch.testing.assert_close(found.float(), plain[name].float(), rtol=0.07, atol=1e-3)
