"""Experts that files hold stacked are read as those of files that hold them one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmdrl.models.config import ModelConfig
from spmdrl.models.files.check import check_directory
from spmdrl.models.files.hf import TensorSource, open_model
from spmdrl.models.files.weight_files import SINGLE
from spmdrl.models.sharding import all_slices
from tiny_model import make_tiny_model


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the experts of each layer into one tensor of gate and up, and one of down."""
    found: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[int, str, Tensor]]] = {}
    for name, tensor in weights.items():
        before, between, after = name.partition(".mlp.experts.")
        if not between:
            found[name] = tensor
            continue
        number, matrix, _ = after.split(".")
        whole = "down_proj" if matrix == "down_proj" else "gate_up_proj"
        parts.setdefault(f"{before}{between}{whole}", []).append((int(number), matrix, tensor))
    for whole, own in parts.items():
        count = max(number for number, _, _ in own) + 1
        # gate_proj comes before up_proj
        in_order = [tensor for _, _, tensor in sorted(own, key=lambda part: part[:2])]
        found[whole] = torch.cat(in_order).view(count, -1, in_order[0].shape[1])
    return found


def held(model: ModelConfig, source: TensorSource, size: int) -> list[Tensor]:
    """All slices of the experts that `size` tensor-parallel ranks hold."""
    found = []
    for rank in range(size):
        slices = all_slices(model, rank, size)
        found += [source.read(s) for own in slices.values() for s in own if ".experts." in s.name]
    return found


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "Qwen3_5MoeForCausalLM"])
def test_both_forms_are_one_model(tmp_path: Path, architecture: str) -> None:
    for name in ("own", "stacked"):
        make_tiny_model(tmp_path / name, architecture)
    weights = stacked(load_file(tmp_path / "own" / SINGLE))
    save_file(weights, tmp_path / "stacked" / SINGLE)
    assert not check_directory(tmp_path / "stacked").errors
    (model, own), (_, other) = (open_model(tmp_path / name) for name in ("own", "stacked"))
    assert own.names == other.names
    for size in (1, 2):
        pairs = list(zip(held(model, own, size), held(model, other, size), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs)


def test_a_stacked_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "Qwen3_5MoeForCausalLM")
    weights = stacked(load_file(tmp_path / SINGLE))
    name = next(name for name in weights if name.endswith("experts.down_proj"))
    save_file({**weights, name: weights[name].mT.contiguous()}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj"):
        open_model(tmp_path)
