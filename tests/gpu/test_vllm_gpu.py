"""vLLM on CUDA: the contract of engines in bfloat16, and weights that leave with its sleep.

Needs one GPU, and the vLLM that goes with torch there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.rollout.vllm_versions import check_version, installed_version
from tiny_model import make_tiny_model


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        check_version(installed_version(), torch.__version__, on_cuda=True)
    except ValueError as error:
        return str(error)
    return None


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(_missing() is not None, reason=_missing() or ""),
]

SHAPE = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "intermediate_size": 512}

WEIGHTS = ("keep", "host", "drop")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vllm_gpu")
    make_tiny_model(root / "model", **SHAPE)
    return root


@pytest.mark.parametrize("weights", WEIGHTS)
def test_grpo_with_weights_that_stay_or_leave(root: Path, weights: str) -> None:
    """One process for each: vLLM's sleeping allocator is one of a process."""
    words = [f"roles.rollout.residency={{weights: {weights}}}", "rollout.sync_check_every=1"]
    settings = {"rollout": {"engine": "vllm", "kv_cache_gb": 0.5}, "steps": 4}
    path = write_config(root / f"{weights}.yaml", root / "model", root / weights, **settings)
    [[records]] = run_ranks(
        run_configs, 1, [(str(path), words)], str(root), timeout_s=600, device="cuda"
    )
    assert len(records) == 4
    for record in records:
        assert record["rollout_gap"] < 0.02 and record["grad_norm"] > 0
        assert record["sync/gb"] == 0, "one rank copies"
        assert record["sync/canary_gap"] < 0.03
