"""Megatron's layouts, made by kinds of layers, are those that list every parameter of a chunk."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
import torch

from spmdrl.distributed.mesh import expert_degrees, expert_place, places_of
from spmdrl.models.config import ModelConfig
from spmdrl.models.flat_pieces import flat_pieces
from spmdrl.models.local_shards import KindTable, LayerKinds, LocalShard, Table, counted
from spmdrl.models.megatron_buffers import chunk_ranges
from spmdrl.models.megatron_chunks import Cut, rank_chunks
from spmdrl.models.megatron_layout import megatron_layout, megatron_state_layout
from spmdrl.testing.cases import tiny_config

EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MODELS = {
    "dense": {"vocab_size": 101},
    "tied": {"vocab_size": 101, "tie_word_embeddings": True},
    # two kinds of layers
    "experts": {**EXPERTS, "mlp_only_layers": [1]},
}
DEGREES = {
    "shards": {"dp_shard": 3},
    "stages": {"pp": 2, "dp_shard": 5, "tp": 2},
    "experts": {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "cp": 2, "tp": 2, "ep": 4},
}


def model_of(name: str, layers: int = 8) -> ModelConfig:
    kind = "Qwen3MoeForCausalLM" if name == "experts" else "Qwen3ForCausalLM"
    return tiny_config(kind, num_hidden_layers=layers, **MODELS[name])


def cut_of(degrees: dict[str, int], *, fused: bool) -> Cut:
    pp = degrees["pp"]
    return Cut(tp=degrees["tp"], pp=pp, vpp=pp, ep=degrees["ep"], fused_norms=fused)


def listed(
    model: ModelConfig,
    degrees: dict[str, int],
    cut: Cut,
    frozen: Collection[str],
    rank: int,
) -> tuple[Table, Table]:
    """The rank's weights and its part of the masters, one parameter after another."""
    ranks = range(math.prod(size for axis, size in degrees.items() if axis != "ep"))
    [(_, place)] = places_of(ranks, degrees, [rank])
    ep_rank = expert_place(degrees, place)["ep"]
    shard = place["dp_shard"] * degrees["cp"] + place["cp"]
    weights, states = {}, {}
    for chunk in rank_chunks(model, cut, place["tp"], place["pp"], ep_rank=ep_rank):
        exchange = expert_degrees(degrees)["exchange"]
        ranges = chunk_ranges(chunk, shard, degrees["dp_shard"] * degrees["cp"], exchange)
        for p in chunk:
            weights[p.name] = LocalShard(
                shape=p.shape,
                dtype=torch.bfloat16,
                slices=p.slices,
                frozen=any(piece.name in frozen for piece in p.slices),
            )
            for piece in flat_pieces(p, *ranges[p.name]):
                states[f"{p.name}:{piece.start}"] = LocalShard(
                    shape=piece.shape, dtype=torch.float32, slices=piece.slices
                )
    return weights, states


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dense", "shards"),
        ("dense", "stages"),
        ("tied", "stages"),
        ("experts", "shards"),
        ("experts", "experts"),
    ],
)
def test_tables_by_kinds_are_those_of_every_parameter(name: str, given: str, fused: bool) -> None:
    model = model_of(name)
    degrees = dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"), 1)
    degrees |= DEGREES[given]
    cut, frozen = cut_of(degrees, fused=fused), {"model.layers.3.self_attn.o_proj.weight"}
    ranks = range(math.prod(size for axis, size in degrees.items() if axis != "ep"))
    weights = megatron_layout(model, ranks, degrees, cut, torch.bfloat16, frozen=frozen)
    states = megatron_state_layout(model, ranks, degrees, cut)
    for rank in ranks:
        for found, expected in zip(
            (weights[rank], states[rank]), listed(model, degrees, cut, frozen, rank), strict=True
        ):
            assert list(found.items()) == list(expected.items()), rank
            sizes = [(held.num_bytes, held.frozen) for held in expected.values()]
            for frozen_ones in (False, True):
                size = sum(
                    own.num_bytes * n for own, n in counted(found) if own.frozen is frozen_ones
                )
                assert size == sum(own for own, is_frozen in sizes if is_frozen is frozen_ones)


def test_sizes_take_as_long_as_a_layer_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models have ten thousand parameters on a rank; a search asks for sizes only."""

    def refused(kinds: LayerKinds) -> None:
        raise AssertionError("names of all layers were listed")

    monkeypatch.setattr(LayerKinds, "listed", property(refused))
    degrees = dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"), 1)
    degrees |= {"dp_shard": 4}
    cut = cut_of(degrees, fused=True)
    numbers = []
    for layers in (8, 64):
        model = model_of("experts", layers)
        weights = megatron_layout(model, range(4), degrees, cut, torch.bfloat16, only=[0])[0]
        states = megatron_state_layout(model, range(4), degrees, cut, only=[0])[0]
        assert isinstance(weights, KindTable) and isinstance(states, KindTable)
        assert len(weights) > 8 * layers
        numbers.append(len(counted(weights)))
        # of some layers it has a part only
        assert len(counted(states)) < 3 * numbers[-1]
    assert numbers[0] == numbers[1] < 40
