"""The sharding table: slices tile every global tensor exactly, whatever the degrees."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from spmdrl.distributed.mesh import coordinates, expert_place
from spmdrl.models.config import ModelConfig, parse_config
from spmdrl.models.degrees import check_tp
from spmdrl.models.local_shards import local_box
from spmdrl.models.sharding import all_slices, global_shapes, local_parameters, slices
from spmdrl.models.tensors import restrict


def config_of(
    architecture: str, *, tied: bool = False, kv_heads: int = 4, **more: Any
) -> ModelConfig:
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
            **more,
        }
    )


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CONFIGS = [
    config_of("LlamaForCausalLM"),
    config_of("Qwen2ForCausalLM", tied=True),
    config_of("Qwen3ForCausalLM"),
    # its first layer is dense
    config_of("Qwen3MoeForCausalLM", **EXPERTS, decoder_sparse_step=2),
    config_of("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    config_of(
        "Qwen2MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=16, sliding_window=None
    ),
    config_of(
        "Glm4MoeForCausalLM",
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        use_qk_norm=True,
    ),
]
STACKED = config_of("GptOssForCausalLM", num_local_experts=8, num_experts_per_tok=2)
REPLICATED = (
    *("norm.weight", "gate.weight", ".router.weight", ".router.bias", "correction_bias"),
    *("o_proj.bias", "down_proj_bias"),
)


@pytest.mark.parametrize("config", [*CONFIGS, STACKED], ids=lambda c: c.architecture)
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
                local_box(local, s).copy_(whole[s.name][box])
            assert not local.isnan().any()
            step = -(-shape[0] // shards)
            for first in range(0, shape[0], step):
                shard = local[first : first + step]
                for s in restrict(held, first, first + step):
                    box = tuple(slice(a, b) for a, b in zip(s.start, s.stop, strict=True))
                    back[s.name][box] = local_box(shard, s)
                    count[s.name][box] += 1
    for name, tensor in whole.items():
        assert torch.equal(back[name], tensor), name
        assert (count[name] == (tp if name.endswith(REPLICATED) else 1)).all(), name


@pytest.mark.parametrize("config", CONFIGS[3:], ids=lambda c: c.architecture)
@pytest.mark.parametrize(("tp", "ep", "data"), [(1, 4, 4), (2, 2, 1), (2, 4, 4), (4, 2, 2)])
def test_every_expert_is_held_as_often_as_there_are_copies(
    config: ModelConfig, tp: int, ep: int, data: int
) -> None:
    """Over the ranks of `data` x `tp`, each value of an expert lies on data * tp / ep / etp."""
    shapes = global_shapes(config)
    count = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    degrees = {"dp_replicate": data, "tp": tp, "ep": ep}
    local = local_parameters(config, tp, ep_size=ep)
    for place in coordinates(degrees):
        ep_rank = expert_place(degrees, place)["ep"]
        for name, held in all_slices(config, place["tp"], tp, ep_rank=ep_rank, ep_size=ep).items():
            assert sum(s.rows for s in held) == local[name][0]
            for s in held:
                assert s.size[1:] == local[name][1:], s
                count[s.name][tuple(map(slice, s.start, s.stop))] += 1
    moe = config.moe
    assert moe is not None
    etp = tp // math.gcd(tp, ep)
    for layer, expert in product(config.moe_layers, range(moe.num_experts)):
        names = [n for n in shapes if f"layers.{layer}." in n and f".experts.{expert}." in n]
        assert len(names) == 3
        for name in names:
            assert (count[name] == data * tp // (ep * etp)).all(), name
    part = ".mlp.experts.gate_up"
    [first] = [n for n in local if n == f"layers.{config.moe_layers[0]}{part}"]
    assert local[first] == (moe.num_experts // ep * 2 * moe.width // etp, 24)


@pytest.mark.parametrize(("tp", "ep", "data"), [(1, 4, 4), (2, 2, 1), (4, 2, 2)])
def test_boxes_of_stacked_experts_are_of_one_expert_each(tp: int, ep: int, data: int) -> None:
    """Parts of gate and up are neighbouring columns, which alternate; only the last bias is whole
    on every rank that has a part of its expert.
    """
    name, config = "model.layers.0.mlp.experts.", STACKED
    moe, hidden, etp = config.moe, config.hidden_size, tp // math.gcd(tp, ep)
    assert moe is not None
    part = moe.width // etp
    count = {n: torch.zeros(s, dtype=torch.int64) for n, s in global_shapes(config).items()}
    degrees = {"dp_replicate": data, "tp": tp, "ep": ep}
    for place in coordinates(degrees):
        ep_rank = expert_place(degrees, place)["ep"]
        held = all_slices(config, place["tp"], tp, ep_rank=ep_rank, ep_size=ep)
        for local, size in {
            "gate_up": (1, hidden, 2 * part),
            "down": (1, part, hidden),
            "gate_up_bias": (1, 2 * part),
            "down_bias": (1, hidden),
        }.items():
            boxes = held[f"layers.0.mlp.experts.{local}"]
            assert [s.size for s in boxes] == [size] * (8 // ep)
            for s in boxes:
                count[s.name][tuple(map(slice, s.start, s.stop))] += 1
    for kind in ("gate_up_proj", "down_proj", "gate_up_proj_bias"):
        assert (count[name + kind] == data * tp // (ep * etp)).all(), kind
    assert (count[f"{name}down_proj_bias"] == data * tp // ep).all()


def test_names_are_those_of_transformers() -> None:
    import transformers

    for config in (*CONFIGS, STACKED):
        kind = config.architecture.removesuffix("ForCausalLM")
        hf_config = getattr(transformers, f"{kind}Config")(**config.source)
        with torch.device("meta"):
            model = getattr(transformers, config.architecture)(hf_config)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        buffers = {name: tuple(b.shape) for name, b in model.named_buffers()}
        expected |= {name: buffers[name] for name in buffers.keys() & model.state_dict().keys()}
        assert stacked(config) == expected


def stacked(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name space as `transformers` has it in memory: experts stacked under one name."""
    shapes = {}
    for name, shape in global_shapes(model).items():
        if (moe := model.moe) is None or ".experts." not in name or moe.form != "each":
            shapes[name.replace(".block_sparse_moe.", ".mlp.")] = shape
            continue
        layer, ffn = name.split(".")[2], moe.width
        here = f"model.layers.{layer}.mlp.experts"
        shapes[f"{here}.gate_up_proj"] = (moe.num_experts, 2 * ffn, model.hidden_size)
        shapes[f"{here}.down_proj"] = (moe.num_experts, model.hidden_size, ffn)
    return shapes


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
    with pytest.raises(ValueError, match=r"tp=4 does not divide .*num_key_value_heads=2: .*16/4\)"):
        check_tp(config, 4)
    check_tp(config, 4, replicate_kv=True)
    message = "num_attention_heads=8, intermediate_size=32, vocab_size=40, .*-heads-to 12/3"
    with pytest.raises(ValueError, match=message):
        check_tp(config, 3)
    with pytest.raises(ValueError, match=r"intermediate_size=12$"):
        check_tp(config_of("LlamaForCausalLM", kv_heads=8, intermediate_size=12), 8)
    with pytest.raises(ValueError, match="ep=2, but LlamaForCausalLM has no experts"):
        check_tp(config, 1, ep=2)
    experts = config_of("Qwen3MoeForCausalLM", **EXPERTS, kv_heads=8)
    check_tp(experts, 8, ep=8)
    with pytest.raises(ValueError, match="ep=3 does not divide the model's num_experts=8"):
        check_tp(experts, 1, ep=3)
    message = "tp=8 with ep=1 divides each expert over 8 ranks, .*intermediate_size=12"
    with pytest.raises(ValueError, match=message):
        check_tp(experts, 8)
    with pytest.raises(ValueError, match=r"no local parameter 'head\.bias'"):
        slices(config, "head.bias", 0, 1)
