"""Who writes what, by properties; and the files themselves, as safetensors reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from spmdrl.checkpoint.index import Mark, only, slice_owners
from spmdrl.checkpoint.stream import write_safetensors
from spmdrl.models.config import parse_config
from spmdrl.models.sharding import global_shapes
from spmdrl.models.tensors import Slice
from spmdrl.weights.layout import key, model_layout

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


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp_replicate": 4},
        {"dp_shard": 4},
        {"dp_replicate": 2, "tp": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"tp": 4},
    ],
)
def test_each_slice_has_one_owner_that_holds_it_and_all_write_alike(degrees) -> None:
    ranks = [1, 2, 4, 5]
    layout = model_layout(CONFIG, ranks, degrees, torch.float32)
    owners = slice_owners(layout)
    load = dict.fromkeys(ranks, 0)
    for piece, owner in owners.items():
        assert any(key(s) == piece for held in layout[owner].values() for s in held.slices)
        load[owner] += piece.numel
    whole = sum(torch.Size(shape).numel() for shape in global_shapes(CONFIG).values())
    assert sum(load.values()) == whole
    assert max(load.values()) < 1.1 * min(load.values())


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
