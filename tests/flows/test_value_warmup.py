"""PPO's first steps train the value alone: the policy cannot move, so its KL steers nothing."""

from __future__ import annotations

from pathlib import Path

from flow_cases import questions, run_configs, write_config
from harness import run_ranks
from tiny_model import make_tiny_model


def test_the_adaptive_coefficient_waits_for_the_policy(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    path = write_config(
        tmp_path / "ppo.yaml",
        tmp_path / "model",
        tmp_path / "run",
        flow="ppo",
        steps=4,
        data=questions(tmp_path / "data.jsonl"),
        roles={"reference": {}, "value": {"head": "zero"}},
        algorithm={
            "kl_coef": 0.1,
            "kl_target": 6.0,
            "kl_horizon": 100,
            "value_warmup_steps": 2,
        },
    )
    records = run_ranks(run_configs, 1, [(str(path), [])], str(tmp_path))[0][0]
    # of the two steps that train the policy: the first moves the coefficient for the second
    coefficients = [round(record["kl_coef"], 6) for record in records]
    assert coefficients == [0.1, 0.096]
