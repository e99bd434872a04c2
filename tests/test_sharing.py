"""The memory plan of configurations: what is refused, what fits, and the estimates behind it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_cases import write_config
from spmdrl.config import Config
from spmdrl.config_files import load_config
from spmdrl.flows.serving import rollout_only
from spmdrl.models.config import read_config
from spmdrl.placement import place_roles
from spmdrl.role_plan import RolePlan, plan_roles
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sharing") / "model"
    make_tiny_model(path)
    return path


def plan_of(config: Config, num_ranks: int) -> RolePlan:
    placements = place_roles(config, num_ranks)
    shapes = {name: read_config(config.model_path(name)) for name in placements}
    return plan_roles(config, placements, shapes, ["cpu"] * num_ranks)


PPO = {
    "flow": "ppo",
    # the rollout's weights are its own: on rank 1, beside the reward and the value
    "roles": {
        "policy": {"ranks": 0},
        "reference": {"ranks": 0},
        "reward": {"ranks": "0-1"},
        "value": {"ranks": 1},
        "rollout": {"ranks": 1, "memory": {"weights": "drop"}},
    },
    "rewards": [{"role": "reward"}],
    "algorithm": {"kl_coef": 0.05, "importance_cap": 2.0},
}


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["evaluation.held_out=4"], "evaluation.held_out=4"),
        (["evaluation.held_out=4", "evaluation.before=false", "evaluation.every=2"], "held_out=4"),
        (["lag=1"], "lag=1"),
        (["algorithm.refill_attempts=2"], "algorithm.refill_attempts=2"),
    ],
)
def test_weights_that_a_call_between_drops_are_refused(model, tmp_path, words, settings):
    path = write_config(tmp_path / "c.yaml", model, tmp_path, **PPO)
    with pytest.raises(ValueError, match=r"roles.rollout.memory.weights=drop with") as refused:
        plan_of(load_config(path, words), 2)
    message = str(refused.value)
    assert settings in message and "rollout.generate needs rollout.weights" in message
    assert "reward.score drops them" in message and "to host or keep" in message


@pytest.mark.parametrize(
    "words",
    [
        [],
        # only after the last sync: nothing is sampled after it
        ["evaluation.held_out=4", "evaluation.before=false"],
        # rewards by functions: no model's turn comes between
        ["evaluation.held_out=4", "rewards=[{function: math}]", "roles.reward=null"],
        ["algorithm.refill_attempts=2", "rewards=[{function: math}]", "roles.reward=null"],
    ],
)
def test_weights_that_every_sync_fills_in_time_may_be_dropped(model, tmp_path, words):
    path = write_config(tmp_path / "c.yaml", model, tmp_path, **PPO)
    plan = plan_of(load_config(path, words), 2)
    assert plan.memory[1].plan.policies["rollout", "weights"] == "drop"


def test_an_evaluation_alone_drops_nothing(model, tmp_path):
    path = write_config(tmp_path / "c.yaml", model, tmp_path, **PPO)
    config = rollout_only(load_config(path), scoring=True)
    assert plan_of(config, 2).memory[1].plan.policies["rollout", "weights"] == "keep"
