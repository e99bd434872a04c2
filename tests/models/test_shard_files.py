"""Safetensors files that grow tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness import run_ranks
from spmdrl.models.config import parse_config
from spmdrl.models.files.export import save_pretrained
from spmdrl.models.files.hf import open_checkpoint
from spmdrl.models.files.safetensors_writer import write_shards
from spmdrl.weights.layout import model_layout
from spmdrl.weights.views import full_tensors
from spmdrl.world import World

TENSORS = {
    "half": torch.arange(3).bfloat16(),
    "wide": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "long": torch.arange(100, dtype=torch.float16),
}


def test_safetensors_reads_what_was_written_in_any_order_and_dtype(tmp_path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    shards = write_shards(TENSORS.items(), shapes, tmp_path, 150)
    # "wide" would not lie aligned after three bfloat16, "long" would make a file too large
    assert shards.names == (("half",), ("wide", "empty", "scalar"), ("long",))
    assert (shards.num_bytes, shards.dtype) == (6 + 24 + 8 + 200, "float16")
    for number, names in enumerate(shards.names):
        file = tmp_path / f"{number}.part"
        found = load_file(file)
        assert list(found) == list(names)
        for name in names:
            assert torch.equal(found[name], TENSORS[name]), name
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert json.loads(file.read_bytes()[8 : 8 + header])["__metadata__"] == {"format": "pt"}


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 12000, "hidden_size": 256,
    "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip
LARGEST = 12000 * 256 * 4


def export(world: World, directory: str) -> int:
    """Bytes by which this rank grows at most while a sharded model of 76 MB is exported."""
    model = parse_config(CONFIG)
    layout = model_layout(model, [0, 1], {"dp_shard": 2}, torch.float32)
    held = {
        name: (torch.full(here.shape, float(number)), here.slices)
        for number, (name, here) in enumerate(layout[world.rank].items())
    }
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew: proc(5)
    before = status_bytes("VmRSS")
    whole = full_tensors(layout, held)
    if world.is_first:
        present = ((name, tensor) for name, tensor in whole if tensor is not None)
        save_pretrained(present, model, directory, None)
    for _ in whole:
        pass
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's proc(5)")
def test_no_rank_holds_a_copy_of_a_model_that_is_exported(tmp_path: Path) -> None:
    growth = run_ranks(export, 2, str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 6 * LARGEST
    # the largest tensor, and the half of it that comes from the other rank
    assert max(growth) < 2.5 * LARGEST, growth
    assert len(open_checkpoint(tmp_path / "model").names) == 16 * 12 + 2
