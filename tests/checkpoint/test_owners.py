"""Who writes what, by properties; and the files themselves, as safetensors reads them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from spmdrl.checkpoint.index import Mark
from spmdrl.checkpoint.owners import frozen_slices, only, owned_slices
from spmdrl.checkpoint.stream import write_safetensors
from spmdrl.models.config import parse_config
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.planning.known_models import known_model
from spmdrl.weights.layout import key, model_layout, trained_layout

CONFIG = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }
)


DEGREES = [
    {"dp_replicate": 4},
    {"dp_shard": 4},
    {"dp_replicate": 2, "tp": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"tp": 4},
    {"pp": 2, "tp": 2},
]


@pytest.mark.parametrize("degrees", DEGREES)
def test_each_slice_has_one_owner_that_holds_it_and_all_write_alike(degrees) -> None:
    ranks = [1, 2, 4, 5]
    layout = model_layout(CONFIG, ranks, degrees, torch.float32)
    seen: set[Slice] = set()
    load = []
    for rank in ranks:
        owned = owned_slices(layout, rank)
        assert owned <= {key(s) for held in layout[rank].values() for s in held.slices}
        assert seen.isdisjoint(owned)
        seen |= owned
        load.append(sum(piece.numel for piece in owned))
    whole = sum(torch.Size(shape).numel() for shape in global_shapes(CONFIG).values())
    assert sum(load) == whole
    assert max(load) < 1.1 * min(load)
    assert not owned_slices(layout, 0)


@pytest.mark.parametrize("degrees", DEGREES)
def test_tables_without_kinds_have_the_same_slices(degrees) -> None:
    layout = model_layout(CONFIG, range(4), degrees, torch.float32)
    plain = {rank: dict(table) for rank, table in layout.items()}
    sums = []
    for found in (layout, plain):
        owned = [owned_slices(found, rank) for rank in range(4)]
        assert sum(map(len, owned)) == len(frozenset().union(*owned))
        sums.append((frozenset().union(*owned), [sum(s.numel for s in own) for own in owned]))
    assert sums[0][0] == sums[1][0]
    assert sums[0][1] == pytest.approx(sums[1][1], rel=0.1)


def test_frozen_slices_have_no_moments_and_leave_a_trained_layout() -> None:
    frozen = {name for name in global_shapes(CONFIG) if name.startswith("model.layers.2.")}
    layout = model_layout(CONFIG, range(4), {"dp_shard": 2, "tp": 2}, torch.float32, frozen=frozen)
    plain = {rank: dict(table) for rank, table in layout.items()}
    for found in (layout, plain):
        trained = trained_layout(found)
        for rank, table in found.items():
            every = {key(piece) for held in table.values() for piece in held.slices}
            fixed = {piece for piece in every if piece.name in frozen}
            assert frozen_slices(table) == fixed != set()
            left = {key(piece) for held in trained[rank].values() for piece in held.slices}
            assert left == every - fixed
    # ranks at equal places share a table, and all shards the kinds of their tensors
    assert len({id(table) for table in trained_layout(layout).values()}) == 4
    assert len({id(table.kinds) for table in trained_layout(layout).values()}) == 2


def test_a_rank_of_thousands_finds_its_slices_in_a_second() -> None:
    degrees = {"dp_replicate": 8, "dp_shard": 64, "tp": 8}
    layout = model_layout(known_model("llama-3.1-70b"), range(4096), degrees, torch.float32)
    begun = time.process_time()
    owned_slices(layout, 0)
    assert time.process_time() - begun < 1


def test_only_owned_slices_are_kept_and_none_may_be_missing() -> None:
    parts = [
        Slice(name=name, shape=(4,), start=(0,), stop=(4,), offset=offset)
        for name, offset in (("a", 0), ("b", 4))
    ]
    tensors = {"w/fused": (torch.zeros(8), tuple(parts))}
    kept = only(tensors, {key(parts[1])})
    assert kept["w/fused"][1] == (parts[1],)
    with pytest.raises(AssertionError, match="name='c'"):
        only(tensors, {Slice(name="c", shape=(4,), start=(0,), stop=(4,), offset=0)})


def test_a_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 10, generator=generator)
    tensors = {
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "rows": wide[2:5],
        "columns": wide[:, 3:7],
        "numbers": torch.arange(7),
        "more rows": wide[3:],
        "nothing": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    mark = write_safetensors(path, tensors)
    content = path.read_bytes()
    assert mark == Mark(num_bytes=len(content), xxh3=xxhash.xxh3_64_hexdigest(content))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
