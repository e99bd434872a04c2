"""Every train backend of the registry on two ranks, DeepSpeed once for each stage of ZeRO, for
tests that combine them.
"""

from __future__ import annotations

from typing import Any

import pytest

from spmdrl.planning.support import Column, columns

BACKENDS: dict[str, Column] = {column.title: column for column in columns()}
"""Name of a backend in tests and tables, such as `deepspeed 3`, and the keys that choose it."""

_LAYOUTS: dict[str, list[str]] = {
    "torch": ["dp_shard=2"],
    "megatron": ["pp=2"],
    "deepspeed": [],  # its ranks have other rows
}
"""Name in the registry -> a layout of its own over two ranks, as keys of a role."""

_OF_EXPERTS: dict[str, list[str]] = {
    "torch": ["dp_shard=2", "ep=2"],
    "megatron": ["tp=2", "ep=2", "megatron.sp=true"],
    "deepspeed": [],
}
"""The same for mixtures of experts, divided where the backend can."""


def words_of(name: str, role: str = "policy", *, experts: bool = False) -> list[str]:
    """Words that let a role train with the backend, over two ranks.

    Args:
        name: in `BACKENDS`.
        experts: whether the role's model is a mixture of experts.
    """
    column = BACKENDS[name]
    own = [*(_OF_EXPERTS if experts else _LAYOUTS)[column.backend]]
    if column.train:
        own.append(f"train.deepspeed.stage={column.train['deepspeed']['stage']}")
    return [f"roles.{role}.{word}" for word in (f"train.backend={column.backend}", *own)]


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
            # a loss near 0 is a sum of terms near 1 that cancel
            least = 1e-5 if metric == "loss" else 1e-6
            wanted_value = pytest.approx(other[metric], rel=1e-4, abs=least)
            assert one[metric] == wanted_value, (one["step"], metric, one[metric], other[metric])
