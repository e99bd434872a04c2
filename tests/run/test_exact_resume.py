"""A run that was stopped anywhere and resumed equals one that never was, bit for bit."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flow_cases import write_config
from harness import run_ranks
from saved_runs import CLOCKS, records, weights
from spmdrl.checkpoint.index import read_index
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from stopping import POLLS
from sweeps import swept
from tiny_model import make_tiny_model
from torchrun import attempt_of, outcome_of

EVERY = int(os.environ.get("SPMDRL_TEST_EVERY_STOP", "0"))
"""Stop at every so many polls instead of at a few chosen ones: scripts/test_faults.sh does."""

ENVIRONMENT = f"environment={Path(__file__).parents[1] / 'stopping.py'}:StopsAt"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    make_tiny_model(root / "model")
    make_tiny_model(root / "value", head="score")
    return root


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
    root: Path,
    name: str,
    ranks: int,
    stops: list[str],
    words: list[str],
    left_out: tuple[str, ...] = CLOCKS,
    **sections: Any,
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
    expected, whole = records(base / "0", left_out), weights(base / "0")
    assert results[0][0] == []
    for stop, names in zip(stops, results[0][1:], strict=True):
        run_dir = base / stop.replace(" ", "_")
        assert len(names) == 1, (stop, names, polls(base))
        for found, line in zip(records(run_dir, left_out), expected, strict=True):
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


def several(few: list[str], more: list[str]) -> pytest.MarkDecorator:
    """Where a test stops: at a few places, and at more for scripts/test_full.sh."""
    cases = [pytest.param(few, id="few"), pytest.param(more, marks=pytest.mark.full, id="more")]
    return pytest.mark.parametrize("stops", cases[:1] if EVERY else cases)


@several(["14 17", "44", "93 90"], ["27 28"])
def test_grpo(root: Path, stops: list[str]) -> None:
    """Stops in evaluations, in generation, between calls, in updates and after the last step."""
    words = ["roles.reference={}", "algorithm.kl_coef=0.05"]
    saved = check(root, f"grpo_{stops[0]}", 2, stops, words, evaluation=EVALUATION)
    # with SPMDRL_TEST_EVERY_STOP there are others
    if len(stops) > 1:
        assert {name[:13] for name in saved} >= {f"step_{n:08d}" for n in (0, 1, 3)}


@several(["17 16", "40 43"], ["13", "19"])
def test_ppo_with_a_controller_and_a_running_mean(root: Path, stops: list[str]) -> None:
    words = [
        "flow=ppo",
        f"roles.value={{model: {root / 'value'}}}",
        "roles.reference={}",
        "algorithm={kl_coef: 0.05, kl_target: 0.1, kl_horizon: 20, score_scaling: whiten}",
    ]
    check(root, f"ppo_{stops[0]}", 2, stops, words)


@several(["5 19", "100 35"], ["4 17", "10 100"])
def test_samples_drawn_ahead_beside_an_update(root: Path, stops: list[str]) -> None:
    """Disjoint ranks: the update goes on while the other rank generates for the next step, with
    weights that the policy does not have any more."""
    words = [
        "lag=1",
        "algorithm.importance_cap=2.0",
        "roles.policy.ranks=0",
        "roles.rollout.ranks=1",
    ]
    check(root, f"lag_{stops[0]}", 2, stops, words)


@pytest.mark.full
@several(["15 20", "27"], ["25"])
def test_samples_drawn_ahead_on_the_same_ranks(root: Path, stops: list[str]) -> None:
    words = ["lag=1", "algorithm.importance_cap=2.0"]
    check(root, f"same_{stops[0]}", 2, stops, words)


@pytest.mark.full
@several(["100 13"], ["4 100", "30"])
def test_a_tensor_parallel_group_stops_and_goes_on_together(root: Path, stops: list[str]) -> None:
    words = ["roles.policy.tp=2", "roles.rollout.tp=2"]
    check(root, f"tp_{stops[0]}", 2, stops, words)


def resume_elsewhere(world: World, config: str, words: list[str]) -> None:
    os.environ[POLLS] = "0"
    with start_reward_server() as server:
        train(load_config(config, words), world, server)


@pytest.mark.parametrize(
    "stop",
    [
        "7 5",
        pytest.param("13", marks=pytest.mark.full),
        pytest.param("16", marks=pytest.mark.full),
    ],
    ids=["generating", "between", "updating"],
)
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


@pytest.mark.parametrize("adapters", swept(["unmerged", "merged"], []))
@several(["100 17"], ["100 35"])
def test_an_engines_copy_of_a_frozen_base_is_not_kept(
    root: Path, adapters: str, stops: list[str]
) -> None:
    """The base comes from the policy again; only what syncs change is in the checkpoint."""
    words = [
        "lag=1",
        "algorithm.importance_cap=2.0",
        "roles.policy={adapter: {rank: 4, targets: [q_proj, down_proj]}, ranks: 0}",
        "roles.rollout.ranks=1",
        f"rollout.adapters={adapters}",
        "train.lr=2e-2",
    ]
    name = f"frozen_{adapters}_{stops[0]}"
    # the first sync of a start proves the adapter, and so moves more
    saved = check(root, name, 2, stops, words, left_out=(*CLOCKS, "sync/gb"))
    held = set()
    # with SPMDRL_TEST_EVERY_STOP there are other stops, which are numbers of polls
    done = [str(number * EVERY + 1) for number in range(len(saved))] if EVERY else stops
    for stop, checkpoint in zip(done, saved, strict=True):
        path = root / name / stop.replace(" ", "_") / "checkpoints" / checkpoint
        for entry in read_index(path).entries:
            if entry.group == "rollout.engine":
                held.add(re.sub(r"\d+", "N", entry.name.removeprefix("model.layers.")))
    print(sorted(held))
    targets = ["N.self_attn.q_proj", "N.mlp.down_proj"]
    kinds = ["weight"] if adapters == "merged" else ["lora_A.weight", "lora_B.weight"]
    assert held == {f"{target}.{kind}" for target in targets for kind in kinds}
