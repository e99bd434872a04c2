"""The proofs of a sync: a corrupted or stale tensor stops the run within the step, and is named."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.batch import Batch
from spmdrl.commands.train import FlowError, train
from spmdrl.config.load import load_config
from spmdrl.distributed.mesh import Mesh
from spmdrl.rewards.server import start_reward_server
from spmdrl.roles.canary import Canary, fixed_rows, largest_mean, replica_of
from spmdrl.roles.generation import Rollout
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.weights.sync import WeightSync
from spmdrl.world import World
from stopping import POLLS
from tiny_model import make_tiny_model

MOVING = ["roles.policy.tp=2", "roles.rollout.tp=1"]
TENSOR = "model.layers.0.mlp.up_proj.weight"


def spoil(kind: str, at: int) -> Any:
    """`WeightSync.run` whose engine does not hold what it should after the sync number `at`."""
    plain = WeightSync.run
    count = 0

    def run(self: WeightSync) -> None:
        nonlocal count
        count += 1
        name, cell = next((name, cell) for name, cell, _ in self.plan.cells() if name == TENSOR)
        views = self.views.target(name, cell)
        before = [view.clone() for view in views]
        plain(self)
        if count != at or dist_rank() != 1:
            return
        if kind == "engine":
            score = NativeEngine.score
            NativeEngine.score = lambda engine, rows, **given: [  # type: ignore[method-assign]
                [value - 0.01 for value in row] for row in score(engine, rows, **given)
            ]
        for view, old in zip(views, before, strict=True):
            if kind == "corrupted":
                view[1, 1] = torch.nextafter(view[1, 1], view[1, 1] + 1)
            elif kind == "stale":
                assert not torch.equal(view, old)
                view.copy_(old)

    return run


def dist_rank() -> int:
    return torch.distributed.get_rank()


def stopped(world: World, path: str, words: list[str], kind: str) -> str:
    """What a run says whose second sync goes wrong on rank 1."""
    config = load_config(path, words)
    plain = WeightSync.run
    WeightSync.run = spoil(kind, 2)  # type: ignore[method-assign]
    try:
        with start_reward_server() as server, pytest.raises(FlowError) as raised:
            train(config, world, server)
    finally:
        WeightSync.run = plain  # type: ignore[method-assign]
    return str(raised.value)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("canary")
    make_tiny_model(root / "model")
    return write_config(root / "c.yaml", root / "model", root / "run", train={"lr": 1e-4})


@pytest.mark.parametrize("kind", ["corrupted", "stale"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_a_run_stops_within_one_step(path: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    """Whatever little a step changes: one last digit, or a tensor by the usual learning rate."""
    words = [*MOVING, f"run_dir={tmp_path}", "rollout.sync_check_every=1000", "train.lr=1e-6"]
    messages = run_ranks(stopped, 2, str(path), [*words, f"model.dtype={dtype}"], kind)
    for message in messages:
        assert message.startswith(f"in step 2: weight sync 2: {TENSOR}[")
        assert message.endswith("on rank 1 is not what the policy holds")


def test_an_engine_that_computes_something_else_stops_the_run(path: Path, tmp_path: Path) -> None:
    """The weights are right, and the canary's log-probabilities are not."""
    words = [*MOVING, "model.dtype=float32", f"run_dir={tmp_path}"]
    messages = run_ranks(stopped, 2, str(path), words, "engine")
    for message in messages:
        assert message.startswith("in step 2: weight sync 2: the canary's log-probabilities")
        assert "every tensor is the policy's, bit for bit" in message


def test_checksums_find_it_first(path: Path, tmp_path: Path) -> None:
    words = [*MOVING, f"run_dir={tmp_path}", "rollout.sync_check_every=1", "model.dtype=float32"]
    messages = run_ranks(stopped, 2, str(path), words, "stale")
    assert all(m.startswith(f"in step 2: weight sync 2: {TENSOR}[") for m in messages)


def stopped_and_spoiled(world: World, path: str, words: list[str]) -> str:
    """What a run says that goes on within its first step and whose sync there goes wrong."""
    config = load_config(path, words)
    with start_reward_server() as server:
        os.environ[POLLS] = "6"
        train(config, world, server)
        latest = (Path(config.run_dir) / "checkpoints" / "latest").read_text()
        assert latest.startswith("step_00000000+"), latest
        os.environ[POLLS] = "0"
        plain = WeightSync.run
        WeightSync.run = spoil("corrupted", 1)  # type: ignore[method-assign]
        try:
            with pytest.raises(FlowError) as raised:
                train(config, world, server)
        finally:
            WeightSync.run = plain  # type: ignore[method-assign]
    return str(raised.value)


def test_a_sync_that_a_resumed_step_repeats_is_proved(path: Path, tmp_path: Path) -> None:
    environment = f"environment={Path(__file__).parents[1] / 'stopping.py'}:StopsAt"
    words = [*MOVING, f"run_dir={tmp_path}", "model.dtype=float32", environment]
    messages = run_ranks(stopped_and_spoiled, 2, str(path), words)
    assert all(m.startswith(f"in step 1: weight sync 1: {TENSOR}[") for m in messages)


def worst_of(world: World, num_replicas: int) -> tuple[float, float]:
    rows = fixed_rows(world, num_replicas, 50)
    distance = torch.full((rows.num_tokens,), 0.02)
    usual = largest_mean(distance, rows, num_replicas)
    one = replica_of(rows)[rows.row_of_token()] == num_replicas - 2
    return usual, largest_mean(torch.where(one, 3.0, distance), rows, num_replicas)


@pytest.mark.parametrize("num_replicas", [2, 64, 256])
def test_one_replica_that_is_off_is_not_lost_among_many(num_replicas: int) -> None:
    for usual, worst in run_ranks(worst_of, 2, num_replicas):
        assert usual == pytest.approx(0.02) and worst == pytest.approx(3.0)


def by_rank(world: World) -> float:
    """The gap of an engine whose log-probabilities are off by the number of its rank."""

    def score(rows: list[tuple[int, ...]], *, temperature: float) -> list[list[float]]:
        return [[float(world.rank)] * (len(row) - 1) for row in rows]

    mesh = Mesh("rollout", range(world.size), {"dp_replicate": world.size}, "cpu")
    rollout = Rollout("rollout", mesh, SimpleNamespace(), SimpleNamespace(score=score))
    canary = Canary(world, num_replicas=world.size, vocab_size=50, dtype=torch.float32)
    zeros = torch.zeros(canary.rows.num_tokens)
    canary._expected = Batch(lengths=canary.rows.lengths, tokens={"logprobs": zeros})
    return canary.gap(rollout)


def test_every_replica_scores_its_own_rows_and_the_worst_one_counts() -> None:
    assert run_ranks(by_rank, 3) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.full), 0.6])
def test_a_run_that_is_right_shows_its_gap(path: Path, tmp_path: Path, temperature: float) -> None:
    """Both sides read the canary at the temperature of the samples."""
    words = [
        f"sampling.temperature={temperature}",
        *MOVING,
        f"run_dir={tmp_path / 'run'}",
        "rollout.sync_bucket_mb=1",
    ]
    words.append("model.dtype=float32")
    [records] = run_ranks(run_configs, 2, [(str(path), words)], str(tmp_path))[0]
    assert len(records) == 3
    for record in records:
        assert 0 < record["sync/canary_gap"] < 2e-5
        assert record["sync/gb"] > 0 and record["sync/gb_per_s"] > 0
