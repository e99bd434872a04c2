"""Adapters for tests: PEFT directories with random values, and roles that share a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spmdrl.models.adapters import Adapter, adapter_shapes, find_targets, make_adapter
from spmdrl.models.config import read_config
from spmdrl.models.files.peft_export import write_adapter
from spmdrl.models.sharding import SCORE, Head


def make_peft(
    directory: Path, base: Path, *, head: Head = "lm", rank: int = 4, seed: int = 0
) -> Adapter:
    """Write an adapter of all matrices with random values, large enough to matter."""
    model = read_config(base)
    adapter = make_adapter(find_targets(model, ["all"]), rank=rank, alpha=2 * rank)
    shapes = dict(adapter_shapes(model, adapter))
    if head == "score":
        shapes[SCORE] = (1, model.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        (name, torch.randn(shape, generator=generator) * 0.1) for name, shape in shapes.items()
    ]
    write_adapter(tensors, model, adapter, directory, base=base, head=head)
    return adapter


def shared_roles(root: Path) -> dict[str, Any]:
    """PPO's roles over one base: `root / "model"`, and the reward's adapter in `root / "judge"`."""
    return {
        "policy": {"adapter": {"rank": 4}},
        "reference": {"base": "policy"},
        "reward": {"base": "policy", "adapter": {"path": str(root / "judge")}},
        "value": {
            "base": "policy",
            "head": "normal",
            "adapter": {"rank": 3, "targets": ["attention"]},
            "train": {"lr": 5e-3},
        },
        "rollout": {},
    }


OWN_BASES = [f"roles.{role}.base=null" for role in ("reference", "reward", "value")]
"""Overrides that give each of `shared_roles` a base of its own."""
