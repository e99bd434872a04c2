"""Every train backend of the registry on two ranks, for tests that combine them."""

from __future__ import annotations

from typing import Any

import pytest

from spmdrl.planning.systems.registry import SYSTEMS

LAYOUTS: dict[str, list[str]] = {
    "torch": ["roles.{role}.dp_shard=2"],
    "megatron": ["roles.{role}.tp=2"],
    "deepspeed": ["roles.{role}.train.deepspeed.stage=2"],
}
"""Backend -> a layout of its own over two ranks, as words of a configuration."""

BACKENDS = tuple(SYSTEMS)


def words_of(backend: str, role: str = "policy") -> list[str]:
    """Words that let a role train with the backend, over two ranks."""
    own = [word.format(role=role) for word in LAYOUTS[backend]]
    return [f"roles.{role}.train.backend={backend}", *own]


GRPO: dict[str, Any] = {
    "environment": "replay:ReplayEnvironment",
    "roles": {"policy": {}, "reference": {}, "rollout": {}},
    "algorithm": {"kl_coef": 0.1, "importance_cap": 2.0},
    "train": {"lr": 1e-3, "microbatch_tokens": 300, "num_minibatches": 2},
}
GRPO_METRICS = ("loss", "grad_norm", "ref_kl", "entropy", "reward")

Records = list[dict[str, float]]


def assert_same_steps(found: Records, wanted: Records, metrics: tuple[str, ...]) -> None:
    """That the steps of `found`, the last ones of `wanted`, have the same metrics to 1e-4."""
    assert 0 < len(found) <= len(wanted)
    for one in found:
        [other] = [record for record in wanted if record["step"] == one["step"]]
        for metric in metrics:
            wanted_value = pytest.approx(other[metric], rel=1e-4, abs=1e-6)
            assert one[metric] == wanted_value, (one["step"], metric)
