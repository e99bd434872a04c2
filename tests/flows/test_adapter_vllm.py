"""GRPO with an adapter that vLLM samples with: merged into its weights, anew at every sync."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flow_cases import run_configs, write_config
from harness import run_ranks
from tiny_model import make_tiny_model
from vllm_cases import needs_vllm

pytestmark = pytest.mark.full

SETTINGS: dict[str, Any] = {
    "roles": {
        "policy": {"adapter": {"rank": 4}, "dp_shard": 2},
        "reference": {"base": "policy", "dp_shard": 2},
        "rollout": {"tp": 2},
    },
    "rollout": {"engine": "vllm", "block_size": 16, "sync_check_every": 1},
    "algorithm": {"kl_coef": 0.05, "importance_cap": 2.0},
    "train": {"lr": 2e-2, "microbatch_tokens": 300, "num_minibatches": 2},
    "checkpoint": {"export": True},
}


@needs_vllm
def test_vllm_samples_with_the_adapter_that_is_trained(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    run_dir = tmp_path / "run"
    path = write_config(tmp_path / "c.yaml", tmp_path / "model", run_dir, **SETTINGS)
    [records] = run_ranks(run_configs, 2, [(str(path), [])], str(tmp_path), timeout_s=500)[0]
    assert len(records) == 3
    for record in records:
        assert record["rollout_gap_max"] < 1e-4 and record["grad_norm"] > 0, record
        assert record["sync/canary_gap"] < 1e-4, record
    # the base alone, which the reference is, would be noticed
    assert records[-1]["ref_kl"] > 0.1
    tensors = load_file(run_dir / "model" / "adapter_model.safetensors")
    assert all(torch.count_nonzero(tensor) for tensor in tensors.values())
