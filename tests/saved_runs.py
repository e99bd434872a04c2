"""What runs leave behind that others must equal bit for bit: metrics, and all that was saved."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from spmdrl.observe.metrics import read_metrics

CLOCKS = (
    *("wall_time", "seconds/", "tokens_per_s/", "efficiency/", "idle/", "memory/"),
    "sync/gb_per_s",
)
"""Metrics that clocks and allocators say."""


def records(run_dir: Path, left_out: tuple[str, ...] = CLOCKS) -> list[dict[str, float]]:
    """All lines, evaluations too, without what clocks and allocators say."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in lines]


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Everything that the last checkpoint holds of the roles, by file."""
    root = run_dir / "checkpoints"
    path = root / (root / "latest").read_text()
    return {
        f"{file.name}: {key}": tensor
        for file in path.glob("*.safetensors")
        for key, tensor in load_file(file).items()
        if not key.startswith("private/")
    }
