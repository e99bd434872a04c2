"""Tables by kinds of layers: their names, sizes and syncs are those of every tensor listed."""

from __future__ import annotations

import pytest
import torch

from spmdrl.models.config import ModelConfig
from spmdrl.models.local_shards import (
    KindTable,
    LayerKinds,
    Table,
    WeightLayout,
    counted,
    named_bytes,
    one_of_each,
)
from spmdrl.models.megatron_chunks import Cut
from spmdrl.models.megatron_layout import megatron_layout
from spmdrl.testing.cases import EXPERTS, tiny_config
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync

RANKS = range(8)
DENSE = tiny_config(num_hidden_layers=6, tie_word_embeddings=True)
SPARSE = tiny_config("Qwen3MoeForCausalLM", num_hidden_layers=6, mlp_only_layers=[2], **EXPERTS)
MEGATRON = {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2, "ep": 1}
FROZEN = frozenset({"model.layers.4.mlp.down_proj.weight", "model.norm.weight"})


def trained(model: ModelConfig, source: str) -> WeightLayout:
    if source == "megatron":
        ep = 2 if model is SPARSE else 1
        cut = Cut(tp=2, pp=2, ep=ep, fused_norms=True)
        return megatron_layout(model, RANKS, {**MEGATRON, "ep": ep}, cut, torch.bfloat16)
    degrees = {
        "shards": {"dp_shard": 8},
        "copies": {"dp_replicate": 4, "tp": 2},
        "alike": {"tp": 2},
    }
    ranks = range(2) if source == "alike" else RANKS
    frozen = FROZEN if model is DENSE else frozenset()
    return model_layout(model, ranks, degrees[source], torch.bfloat16, frozen=frozen)


def engine(model: ModelConfig) -> WeightLayout:
    ep = 2 if model is SPARSE else 1
    return model_layout(model, RANKS, {"dp_replicate": 4, "tp": 2, "ep": ep}, torch.bfloat16)


def listed(layout: WeightLayout) -> WeightLayout:
    """Make plain tables that list every tensor, one for all ranks that share a table."""
    made: dict[int, Table] = {}
    return {rank: made.setdefault(id(t), dict(t)) for rank, t in layout.items()}


@pytest.mark.parametrize("source", ["megatron", "shards", "copies", "alike"])
@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "experts"])
def test_syncs_by_layers_are_those_of_listed_tensors(model: ModelConfig, source: str) -> None:
    one, other = trained(model, source), engine(model)
    found = plan_sync(one, other, node_size=4)
    expected = plan_sync(listed(one), listed(other), node_size=4)
    assert found.digest == expected.digest
    merged = frozenset({"model.layers.1.self_attn.o_proj.weight"})
    found, expected = (
        plan_sync(*pair, merged=merged) for pair in ((one, other), map(listed, (one, other)))
    )
    assert found.digest == expected.digest


@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "experts"])
def test_a_name_is_found_without_the_list_of_all(model: ModelConfig) -> None:
    for layout in (trained(model, "megatron"), trained(model, "shards"), engine(model)):
        for table in layout.values():
            assert isinstance(table, KindTable) and isinstance(table.kinds, LayerKinds)
            names = list(table.kinds.listed)
            assert len(names) == len(table) == sum(n for _, n in counted(table))
            assert {name: table.kinds[name] for name in names} == table.kinds.listed
            assert all(table.kinds.kind(name) == table.kinds[name][0] for name in names)
            sizes = {name: held.num_bytes for name, held in table.items()}
            assert named_bytes(table, names[::2]) == sum(sizes[name] for name in names[::2])
            assert sum(held.num_bytes * n for held, n in counted(table)) == sum(sizes.values())
            for name, held in one_of_each(table).items():
                assert name not in names or table[name].shape == held.shape
            for name in ("layers.99.input_norm.weight", "layers.0.input_norm", "lm_head"):
                with pytest.raises(KeyError):
                    table.kinds[name]
