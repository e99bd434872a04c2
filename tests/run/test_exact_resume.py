"""A run that was stopped anywhere and resumed equals one that never was, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flow_cases import write_config
from harness import run_ranks
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from stopping import POLLS
from tiny_model import make_tiny_model
from torchrun import attempt_of, outcome_of

EVERY = int(os.environ.get("SPMDRL_TEST_EVERY_STOP", "0"))
"""Stop at every so many polls instead of at a few chosen ones: scripts/test_faults.sh does."""

ENVIRONMENT = f"environment={Path(__file__).parents[1] / 'stopping.py'}:StopsAt"
CLOCKS = ("wall_time", "seconds/", "tokens_per_s/", "memory/", "sync/gb_per_s")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    make_tiny_model(root / "model")
    make_tiny_model(root / "value", head="score")
    return root


def records(run_dir: Path) -> list[dict[str, float]]:
    """All lines, evaluations too, without what clocks and allocators say."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds of the roles."""
    root = run_dir / "checkpoints"
    path = root / (root / "latest").read_text()
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        found |= {k: t for k, t in tensors.items() if not k.startswith("private/")}
    return found


def run_stopped(
    world: World, config: str, base: Path, stops: list[str], words: list[str]
) -> list[list[str]]:
    """A run without a stop, and one for each of `stops` that is stopped there and resumed; what
    their stops have saved."""
    found = []
    with start_reward_server() as server:
        for stop in ["0", *stops]:
            os.environ[POLLS] = stop
            overrides = [*words, f"run_dir={base / stop.replace(' ', '_')}", ENVIRONMENT]
            run_dir = base / stop.replace(" ", "_")
            names = []
            for _ in range(3):
                train(load_config(config, overrides), world, server)
                torch.distributed.barrier()
                if outcome_of(run_dir) == "done":
                    break
                latest = run_dir / "checkpoints" / "latest"
                names.append(latest.read_text() if latest.is_file() else "nothing")
                os.environ[POLLS] = "0"
                torch.distributed.barrier()
            found.append(names)
    return found


def check(
    root: Path, name: str, ranks: int, stops: list[str], words: list[str], **sections: Any
) -> list[str]:
    """Every stopped run equals the whole one; what the stops had saved."""
    config = write_config(
        root / f"{name}.yaml",
        root / "model",
        root / name,
        steps=3,
        data={"prompts_per_step": 4, "group_size": 2},
        **{"train": {"num_minibatches": 2, "epochs": 2}, **sections},
    )
    base = root / name
    if EVERY:
        run_ranks(run_stopped, ranks, str(config), base, [], words, timeout_s=300)
        stops = [str(number) for number in range(1, max(polls(base)) - 1, EVERY)]
    results = run_ranks(run_stopped, ranks, str(config), base, stops, words, timeout_s=3000)
    expected, whole = records(base / "0"), weights(base / "0")
    assert results[0][0] == []
    for stop, names in zip(stops, results[0][1:], strict=True):
        run_dir = base / stop.replace(" ", "_")
        assert len(names) == 1, (stop, names, polls(base))
        for found, line in zip(records(run_dir), expected, strict=True):
            differing = {k for k in found | line if found.get(k) != line.get(k)}
            assert not differing, (stop, line["step"], differing)
        tensors = weights(run_dir)
        assert tensors.keys() == whole.keys()
        assert all(torch.equal(tensors[key], whole[key]) for key in whole), stop
    print(name, "polls", polls(base), "saved", results[0][1:])
    return [names[0] for names in results[0][1:]]


def polls(base: Path) -> list[int]:
    """How often each rank of the whole run looked for a request."""
    files = sorted(attempt_of(base / "0").glob("polls_*"))
    return [int(path.read_text()) for path in files]


EVALUATION = {"held_out": 2, "every": 1, "num_samples": 2}


def test_grpo(root: Path) -> None:
    """Stops in evaluations, in generation, between calls, in updates and after the last step."""
    stops = ["14 17", "27 28", "44", "93 90"]
    words = ["roles.reference={}", "algorithm.kl_coef=0.05"]
    saved = check(root, "grpo", 2, stops, words, evaluation=EVALUATION)
    # with SPMDRL_TEST_EVERY_STOP there are others
    assert {name[:13] for name in saved} >= {f"step_{n:08d}" for n in (0, 1, 3)}


def test_ppo_with_a_controller_and_a_running_mean(root: Path) -> None:
    words = [
        "flow=ppo",
        f"roles.value={{model: {root / 'value'}}}",
        "roles.reference={}",
        "algorithm={kl_coef: 0.05, kl_target: 0.1, kl_horizon: 20, score_scaling: whiten}",
    ]
    check(root, "ppo", 2, ["13", "17 16", "19", "40 43"], words)


def test_samples_drawn_ahead_beside_an_update(root: Path) -> None:
    """Disjoint ranks: the update goes on while the other rank generates for the next step, with
    weights that the policy does not have any more."""
    words = [
        "lag=1",
        "algorithm.importance_cap=2.0",
        "roles.policy.ranks=0",
        "roles.rollout.ranks=1",
    ]
    check(root, "lag", 2, ["4 17", "5 19", "100 35", "10 100"], words)


def test_samples_drawn_ahead_on_the_same_ranks(root: Path) -> None:
    words = ["lag=1", "algorithm.importance_cap=2.0"]
    check(root, "same", 2, ["15 20", "25", "27"], words)


def test_a_tensor_parallel_group_stops_and_goes_on_together(root: Path) -> None:
    words = ["roles.policy.tp=2", "roles.rollout.tp=2"]
    check(root, "tp", 2, ["4 100", "100 13", "30"], words)


def resume_elsewhere(world: World, config: str, words: list[str]) -> None:
    os.environ[POLLS] = "0"
    with start_reward_server() as server:
        train(load_config(config, words), world, server)


@pytest.mark.parametrize("stop", ["7 5", "13", "16"], ids=["generating", "between", "updating"])
def test_another_number_of_ranks_goes_on_with_what_was_kept(root: Path, stop: str) -> None:
    """Up to rounding: the step's metrics on one rank are those that two would have found."""
    config = write_config(
        root / "elsewhere.yaml",
        root / "model",
        root / "elsewhere",
        steps=1,
        train={"num_minibatches": 2, "epochs": 2},
        evaluation={"before": False, "after": False},
    )
    base = root / f"elsewhere_{stop.replace(' ', '_')}"
    words = ["roles.reference={}", "algorithm.kl_coef=0.05"]
    run_ranks(stop_once, 2, str(config), base, stop, words)
    assert "+" in (base / "stopped" / "checkpoints" / "latest").read_text()
    again = [*words, ENVIRONMENT, f"run_dir={base / 'stopped'}"]
    run_ranks(resume_elsewhere, 1, str(config), again)
    (found,), (expected,) = records(base / "stopped"), records(base / "whole")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key


def stop_once(world: World, config: str, base: Path, stop: str, words: list[str]) -> None:
    """A run without a stop, and one that is stopped."""
    with start_reward_server() as server:
        for name, at in (("whole", "0"), ("stopped", stop)):
            os.environ[POLLS] = at
            train(
                load_config(config, [*words, ENVIRONMENT, f"run_dir={base / name}"]), world, server
            )
