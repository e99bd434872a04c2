"""Directories of reward and value models as the hub has them, made of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny_model import make_tiny_model


def make_hub_model(
    directory: Path,
    heads: dict[str, torch.Tensor],
    architectures: list[str] | None = None,
    *,
    family: str = "LlamaForCausalLM",
    with_logits: bool = False,
    **changes: Any,
) -> Path:
    """Write a tiny model whose heads are these tensors; `changes` go into config.json."""
    make_tiny_model(directory, family, tie_word_embeddings=False)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if not with_logits:
        del tensors["lm_head.weight"]
    save_file(tensors | heads, file, metadata={"format": "pt"})
    config = directory / "config.json"
    source = json.loads(config.read_text()) | changes
    source["architectures"] = [family] if architectures is None else architectures
    config.write_text(json.dumps(source))
    return directory


def linear_head(name: str, *, bias: bool = False, rows: int = 1) -> dict[str, torch.Tensor]:
    """Make a head's tensors; the bias is large enough to see."""
    weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(5)) * 0.2
    return {
        f"{name}.weight": weight,
        **({f"{name}.bias": torch.full((rows,), 0.7)} if bias else {}),
    }
