"""Rope of every kind against transformers, and the values of config.json that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spmdrl.models.config import parse_config, tiny
from spmdrl.models.fields import Fields
from spmdrl.models.rope import (
    RopeConfig,
    inverse_frequencies,
    parse_rope,
    rope_parameters,
    rope_tables,
    rotate,
    score_factor,
)

DIM, LENGTH = 16, 64
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LISTS = {"short_factor": [1.0 + i / 9 for i in range(6)], "long_factor": [2.0] * 6}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 8,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16, **LISTS},
    "longrope with a factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
        "factor": 9.0,
        **LISTS,
    },
}


def parsed(rope: dict[str, Any], *, partial: bool = True, **more: Any) -> RopeConfig:
    fields = Fields(values={"rope_parameters": rope, **more}, origin="config.json")
    given = rope_parameters(fields)[None]
    assert given is not None
    return parse_rope(given, max_position=LENGTH, head_dim=DIM, partial=partial)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_rope_equals_that_of_transformers(kind: str) -> None:
    """GLM-4.5 turns the first part of each head, half against half."""
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe import modeling_glm4_moe as theirs

    values = {**KINDS[kind], "rope_theta": 5000.0, "partial_rotary_factor": 0.75}
    config = Glm4MoeConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        head_dim=DIM,
        max_position_embeddings=LENGTH,
        rope_parameters=dict(values),
    )
    rope = parsed(values)
    positions = torch.arange(16)
    q, k = torch.randn(2, 1, 3, 16, DIM)
    table = theirs.Glm4MoeRotaryEmbedding(config)(q, positions[None])
    expected = theirs.apply_rotary_pos_emb(q, k, *table)
    tables = own_tables(rope, positions)
    for x, other in zip((q, k), expected, strict=True):
        ours = rotate(x[0].transpose(0, 1), *tables).transpose(0, 1)
        torch.testing.assert_close(ours, other[0], atol=1e-5, rtol=1e-5)
    assert rope.limit == {"longrope": 16, "dynamic": LENGTH}.get(rope.kind)


def own_tables(rope: RopeConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    frequencies = torch.tensor(inverse_frequencies(rope, DIM))
    return rope_tables(positions, frequencies, rope.attention_factor)


def test_neighbours_turn_as_in_transformers() -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.glm4 import modeling_glm4 as glm

    rope, positions = RopeConfig(theta=100.0, interleaved=True), torch.arange(16)
    cos, sin = own_tables(rope, positions)
    frequencies = torch.tensor(inverse_frequencies(rope, DIM))
    angles = torch.cat((positions[:, None] * frequencies,) * 2, dim=-1)[None]
    q, k = torch.randn(2, 1, 3, 16, DIM)
    ours = [rotate(x[0].transpose(0, 1), cos, sin, True).transpose(0, 1) for x in (q, k)]
    theirs = deepseek.apply_rotary_pos_emb_interleave(q, k, angles.cos(), angles.sin())
    for x, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, other[0], atol=1e-5, rtol=1e-5)
    # GLM-4 leaves the pairs where they were: the scores are the same
    other_q, other_k = glm.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    scores = other_q[0] @ other_k[0].mT
    torch.testing.assert_close(ours[0] @ ours[1].mT, scores, atol=1e-4, rtol=1e-5)


def test_the_rest_of_a_head_passes_with_its_gradient() -> None:
    tables = own_tables(RopeConfig(partial=0.5), torch.arange(5))
    x = torch.randn(5, 2, DIM, requires_grad=True)
    out = rotate(x, *tables)
    assert torch.equal(out[..., 8:], x[..., 8:]) and not torch.equal(out[1:, :, :8], x[1:, :, :8])
    out.square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach(), atol=1e-5, rtol=1e-5)


def test_an_odd_part_is_rounded_up() -> None:
    assert len(inverse_frequencies(RopeConfig(partial=0.2), 16)) == 2  # of 3 dims
    assert own_tables(RopeConfig(partial=0.2), torch.arange(2))[0].shape[-1] == 4


def test_kinds_of_layers_have_their_own_rope() -> None:
    kinds = ("full_attention", "sliding_attention", "none")
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {},
        "none": None,
    }
    fields = Fields(values={"rope_parameters": nested, "rope_theta": 7.0}, origin="config.json")
    found = rope_parameters(fields, kinds)
    full, sliding = (found[kind] for kind in kinds[:2])
    assert full is not None and sliding is not None and found["none"] is None
    ropes = [parse_rope(given, max_position=LENGTH, head_dim=DIM) for given in (full, sliding)]
    assert [(rope.kind, rope.theta, rope.factor) for rope in ropes] == [
        ("linear", 1e6, 8.0),
        ("default", 7.0, 1.0),
    ]
    with pytest.raises(ValueError, match="rope_parameters: the key 'other' is missing"):
        rope_parameters(fields, (*kinds, "other"))
    flat = Fields(values={"rope_parameters": {"rope_theta": 5.0}}, origin="config.json")
    given = rope_parameters(flat, kinds)
    assert {kind: one and one.number("rope_theta") for kind, one in given.items()} == dict.fromkeys(
        kinds, 5.0
    )


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be at most 1 and give"),
        ({"partial_rotary_factor": 0.1}, "at least 2 of a head's 16 dims"),
        ({"rope_type": "dynamic"}, "the key 'factor' is missing"),
        ({"rope_type": "longrope"}, "the key 'short_factor' is missing"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "short_factor has 1 numbers, but .* 8"),
        (
            {"rope_type": "longrope", "short_factor": [0.0] * 8},
            r"short_factor\[0\] must be above 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed({"rope_theta": 1e4, **rope})


def test_the_limit_counts_as_the_models_positions_and_names_its_key() -> None:
    base: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100}
    lists = {"short_factor": [1.5] * 64, "long_factor": [3.0] * 64}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 512, **lists}
    model = parse_config({**base, "max_position_embeddings": 2048, "rope_scaling": long})
    assert model.max_position == 512 and model.attention.rope.factor == 4.0
    text = model.describe_positions()
    assert "512 positions" in text and "original_max_position_embeddings=512" in text
    small = tiny(model)
    assert small.attention.rope.factors == (1.5,) * 16 and parse_config(small.source) == small
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    model = parse_config({**base, "rope_scaling": dynamic})
    assert model.max_position == 2048
    assert " max_position_embeddings=2048" in model.describe_positions()
    assert parse_config(base).describe_positions() == "2048 positions"


def test_scores_are_scaled_as_deepseek_does() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale

    given = Fields(values=KINDS["mscale"], origin="config.json")
    assert score_factor(given) == pytest.approx(yarn_get_mscale(40.0, 0.7) ** 2)
    assert score_factor(Fields(values=KINDS["yarn"], origin="config.json")) == 1.0
