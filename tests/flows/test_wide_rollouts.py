"""Rollouts on more tensor-parallel ranks than there are key-value heads, and replicas of a rollout
that share their experts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from spmdrl.config.load import load_config
from spmdrl.models.config import read_config
from spmdrl.placement import place_roles
from spmdrl.planning.plan import plan_roles
from tiny_model import make_tiny_model

ARCHITECTURES = {"dense": "LlamaForCausalLM", "experts": "Qwen3MoeForCausalLM"}
"""Both tiny models have two key-value heads."""

RUNS = {
    "dense": [["roles.reference.tp=2", "roles.rollout.tp=2"]]
    + [["roles.reference.tp=4", "roles.rollout.tp=4"]],
    "experts": [["roles.rollout.ep=1"], ["roles.rollout.ep=4"]],
}
"""By model, runs whose samples are the same."""


def written(directory: Path, name: str) -> str:
    """GRPO of a sharded policy, with a reference; its fewer prompts than ranks are divided."""
    make_tiny_model(directory / name, ARCHITECTURES[name])
    return str(
        write_config(
            directory / f"{name}.yaml",
            directory / name,
            directory / "run",
            roles={"policy": {"dp_shard": 4}, "reference": {}, "rollout": {}},
            algorithm={"kl_coef": 0.1},
            data={**questions(directory / "data.jsonl"), "prompts_per_step": 3, "group_size": 3},
            rollout={"sync_check_every": 1},
            steps=2,
        )
    )


@pytest.mark.full
def test_samples_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    cases = [
        (path, [*words, f"run_dir={tmp_path / name}_{number}"])
        for name, runs in RUNS.items()
        for path in [written(tmp_path, name)]
        for number, words in enumerate(runs)
    ]
    found = iter(run_ranks(run_configs, 4, cases, "", timeout_s=300)[0])
    for name, runs in RUNS.items():
        first = next(found)
        for words in runs[1:]:
            for record, other in zip(first, next(found), strict=True):
                for metric in ("response_length", "reward", "loss", "grad_norm", "kl"):
                    expected = pytest.approx(record[metric], rel=1e-4, abs=1e-6)
                    assert other[metric] == expected, (name, words, metric)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("dense", ["roles.policy.dp_shard=1", "roles.policy.tp=4"], r"tp=4 does not .*heads=2"),
        (
            "experts",
            ["roles.policy.adapter={rank: 4}", "rollout.adapters=unmerged", "roles.rollout.ep=4"],
            r"rollout\.adapters=unmerged with roles\.rollout\.ep=4: .* set merged",
        ),
    ],
)
def test_what_is_not_summed_or_added_is_refused(
    tmp_path: Path, name: str, words: list[str], message: str
) -> None:
    config = load_config(written(tmp_path, name), words)
    shape = read_config(tmp_path / name)
    placements = place_roles(config, 4)
    with pytest.raises(ValueError, match=message):
        plan_roles(config, placements, dict.fromkeys(placements, shape), ["cpu"] * 4)
