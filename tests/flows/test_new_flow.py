"""A new flow is one row of the table and one file, and is checked, explained and trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import spmdrl.config.shipped_flows as table
from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.commands.check import check
from spmdrl.commands.plan import plan_text
from spmdrl.config.load import load_config
from spmdrl.config.shipped_flows import ShippedFlow
from spmdrl.world import World
from tiny_model import make_tiny_model

FILE = '''
"""Rejection sampling: maximise the likelihood of each prompt's best samples."""

from spmdrl.flows.environment import GroupEnvironment
from spmdrl.flows.policy_terms import update_of
from spmdrl.flows.sft import likelihood_loss
from spmdrl.roles.handles import Policy
from spmdrl.run.step_report import update_metrics


def rejection(run):
    environment = run.make(run.config.environment, GroupEnvironment)
    policy, sync = run.role("policy", Policy), run.weight_sync("policy", "rollout")
    for step in run.steps():
        sync.run()
        batch = environment.collect(step)
        kept = batch.select((batch["rewards"] > 0).nonzero().flatten())
        shares = kept.row_sum(kept["loss_mask"]).double()
        update = update_of(run, "policy", step, (), temperature=run.config.sampling.temperature)
        kept = kept.with_columns(rows={"loss_share": shares})
        records = policy.update(kept, likelihood_loss, update)
        run.finish(step, batch, {**environment.metrics(), **update_metrics(records)})
    sync.run()
    run.conclude()
'''


@contextmanager
def with_row(file: Path) -> Iterator[None]:
    row = ShippedFlow(
        name="rejection",
        function=f"{file}:rejection",
        needs=("policy", "rollout"),
        updates=("policy",),
        samples=True,
        algorithm_keys=frozenset({"refill_attempts"}),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "FLOWS", {**table.FLOWS, row.name: row})
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The flow's file, and a configuration of it."""
    root = tmp_path_factory.mktemp("new_flow")
    make_tiny_model(root / "model")
    (root / "rejection.py").write_text(FILE)
    path = write_config(root / "c.yaml", root / "model", root / "run", flow="rejection", steps=2)
    return root / "rejection.py", path


def test_what_its_row_says_is_checked_and_explained(places: tuple[Path, Path]) -> None:
    file, path = places
    with pytest.raises(ValueError, match="flow='rejection': shipped flows are"):
        check(load_config(path), 1)
    refused = {
        "lag=1": r"lag=1 with flow=rejection, which does not read it \(that do .*grpo",
        "algorithm.gamma=0.9": "algorithm.gamma=0.9 with flow=rejection",
        "preference.beta=0.2": "preference.beta=0.2 with flow=rejection",
        "roles.rollout=null": "flow=rejection needs roles.rollout",
        "roles.policy.trained=false": "roles.policy.trained=false with flow=rejection",
        "rewards=[]": "with flow=rejection: name at least one function",
        "sampling.temperature=0": "sampling.temperature=0.0 with flow=rejection",
    }
    with with_row(file):
        assert "prompts" in check(load_config(path), 1).describe()
        assert "roles.value: flow=rejection never asks it" in plan_text(
            load_config(path, ["roles.value={}"]), 1
        )
        for word, message in refused.items():
            with pytest.raises(ValueError, match=message):
                load_config(path, [word])
        assert load_config(path, ["algorithm.refill_attempts=1"]).algorithm.refill_attempts == 1


def train_with_row(world: World, file: Path, path: Path) -> list[dict[str, float]]:
    with with_row(file):
        return run_configs(world, [(str(path), [])], str(path.parent))[0]


def test_it_trains(places: tuple[Path, Path]) -> None:
    records = run_ranks(train_with_row, 2, *places)[0]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records)
