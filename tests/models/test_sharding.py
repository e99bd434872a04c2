"""The sharding table: slices tile every global tensor exactly, whatever the degrees."""

from __future__ import annotations

import pytest
import torch

from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.sharding import (
    all_slices,
    check_tp,
    global_shapes,
    local_parameters,
    restrict,
    slices,
)


def config_of(architecture: str, *, tied: bool = False, kv_heads: int = 4) -> ModelConfig:
    return parse_config(
        {
            "architectures": [architecture],
            "vocab_size": 40,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": kv_heads,
            "head_dim": 6,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 64,
        }
    )


CONFIGS = [
    config_of("LlamaForCausalLM"),
    config_of("Qwen2ForCausalLM", tied=True),
    config_of("Qwen3ForCausalLM"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 3])
def test_slices_reassemble_every_tensor(config: ModelConfig, tp: int, shards: int) -> None:
    """Fill local tensors from global ones, shard their rows as FSDP does, and put all back."""
    shapes = global_shapes(config)
    count = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    back = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for rank in range(tp):
        for name, held in all_slices(config, rank, tp).items():
            shape = local_parameters(config, tp)[name]
            local = torch.full(shape, float("nan"))
            for s in held:
                box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
                local[s.offset : s.offset + s.rows] = whole[s.name][box]
            assert not local.isnan().any()
            step = -(-shape[0] // shards)
            for first in range(0, shape[0], step):
                shard = local[first : first + step]
                for s in restrict(held, first, first + step):
                    box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
                    back[s.name][box] = shard[s.offset : s.offset + s.rows]
                    count[s.name][box] += 1
    for name, tensor in whole.items():
        assert torch.equal(back[name], tensor), name
        replicated = name.endswith("norm.weight")
        assert (count[name] == (tp if replicated else 1)).all(), name


def test_names_are_those_of_transformers() -> None:
    import transformers

    for config in CONFIGS:
        kind = config.architecture.removesuffix("ForCausalLM")
        hf_config = getattr(transformers, f"{kind}Config")(**config.source)
        with torch.device("meta"):
            model = getattr(transformers, config.architecture)(hf_config)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert global_shapes(config) == expected


def test_key_value_heads_are_repeated_over_more_ranks() -> None:
    config = config_of("LlamaForCausalLM", kv_heads=2)
    held = [slices(config, "layers.1.attention.qkv.weight", rank, 4) for rank in range(4)]
    assert [(k.start[0], k.stop[0]) for _, k, _ in held] == [(0, 6), (0, 6), (6, 12), (6, 12)]
    assert [q.start[0] for q, _, _ in held] == [0, 12, 24, 36]
    assert [s.offset for s in held[3]] == [0, 12, 18]
    assert local_parameters(config, 4)["layers.1.attention.qkv.weight"] == (24, 24)


def test_restrict_drops_what_lies_outside() -> None:
    held = slices(CONFIGS[0], "layers.0.mlp.gate_up.weight", 1, 2)
    assert [(s.offset, s.rows) for s in held] == [(0, 16), (16, 16)]
    inside = restrict(held, 20, 26)
    assert len(inside) == 1
    only = inside[0]
    assert only.name == "model.layers.0.mlp.up_proj.weight"
    assert (only.start, only.stop, only.offset) == ((20, 0), (26, 24), 0)
    assert restrict(held, 32, 40) == ()


def test_degrees_that_do_not_divide_are_refused() -> None:
    config = config_of("LlamaForCausalLM", kv_heads=2)
    check_tp(config, 2)
    with pytest.raises(ValueError, match=r"tp=4 does not divide .*num_key_value_heads=2"):
        check_tp(config, 4)
    check_tp(config, 4, replicate_kv=True)
    message = "num_attention_heads=8, intermediate_size=32, vocab_size=40"
    with pytest.raises(ValueError, match=message):
        check_tp(config, 3)
    with pytest.raises(ValueError, match=r"no local parameter 'head\.bias'"):
        slices(config, "head.bias", 0, 1)
