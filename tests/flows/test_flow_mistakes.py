"""Mistakes in a flow of the user's own: the error says what is missing."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flow_cases import write_config
from harness import run_ranks
from spmdrl.commands.train import FlowError, train
from spmdrl.config.load import load_config
from spmdrl.flows.environment import GroupEnvironment
from spmdrl.rewards.server import start_reward_server
from spmdrl.roles.handles import Policy, Update
from spmdrl.run.run import Run
from spmdrl.run.step_report import update_metrics
from spmdrl.training.protocol import LossFn, LossInput
from spmdrl.world import World
from tiny_model import make_tiny_model


def imitate(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs = given["logprobs"]
    return -logprobs.sum(), {"tokens": torch.tensor(float(len(logprobs))).double()}


def flow(run: Run, loss: LossFn = imitate, columns: tuple[str, ...] = ()) -> None:
    """A whole one: what the others leave out or do otherwise is their mistake."""
    policy, environment = run.role("policy", Policy), GroupEnvironment(run)
    sync = run.weight_sync("policy", "rollout")
    for step in run.steps():
        sync.run()
        batch = environment.collect(step)
        batch = batch.with_columns(rows={"loss_share": batch["response_lengths"].double()})
        records = policy.update(batch, loss, Update(seed=0, step=step, columns=columns))
        run.finish(step, batch, {**environment.metrics(), **update_metrics(records)})
    run.conclude()


def no_finish(run: Run) -> None:
    environment, sync = GroupEnvironment(run), run.weight_sync("policy", "rollout")
    for step in run.steps():
        sync.run()
        environment.collect(step)
    run.conclude()


def no_conclude(run: Run) -> None:
    environment, sync = GroupEnvironment(run), run.weight_sync("policy", "rollout")
    for step in run.steps():
        sync.run()
        batch = environment.collect(step)
        run.finish(step, batch, environment.metrics())


def other_sync(run: Run) -> None:
    run.weight_sync("policy", "critic")


def other_role(run: Run) -> None:
    run.role("critic", Policy)


def missing_column(run: Run) -> None:
    flow(run, lambda given: (given.columns["advantage"].sum(), {}))


def missing_output(run: Run) -> None:
    flow(run, lambda given: (given["logprob"].sum(), {}))


def no_metrics(run: Run) -> None:
    def sum_alone(given: LossInput) -> Any:
        return given["logprobs"].sum()

    flow(run, sum_alone)


def loss_by_token(run: Run) -> None:
    flow(run, lambda given: (given["logprobs"], imitate(given)[1]))


def no_tokens(run: Run) -> None:
    flow(run, lambda given: (imitate(given)[0], {"nll": given["logprobs"].double().sum()}))


def name_of_the_update(run: Run) -> None:
    flow(run, lambda given: (imitate(given)[0], {**imitate(given)[1], "lr": torch.tensor(1.0)}))


def metric_of_tokens(run: Run) -> None:
    flow(run, lambda given: (imitate(given)[0], {**imitate(given)[1], "nll": given["logprobs"]}))


def name_of_the_run(run: Run) -> None:
    environment, sync = GroupEnvironment(run), run.weight_sync("policy", "rollout")
    for step in run.steps():
        sync.run()
        batch = environment.collect(step)
        run.finish(step, batch, {**environment.metrics(), "seconds/step": 1.0})
    run.conclude()


def not_finite(run: Run) -> None:
    flow(run, lambda given: (given["logprobs"].sum() * torch.nan, imitate(given)[1]))


MISTAKES = {
    "no_finish": "in step 1: .*left the step without run.finish",
    "no_conclude": "returned without run.conclude",
    "other_role": r"needs roles.critic; the configuration has \['policy', 'rollout'\]",
    "other_sync": "policy -> critic; the configuration's roles have policy -> rollout",
    "missing_column": r"asks for 'advantage' and is given \[.*Update\(columns",
    "missing_output": r"asks for 'logprob' and is given \[.*'logprobs'",
    "no_metrics": r"sum_alone must return \(loss, metrics\)",
    "loss_by_token": "a tensor without dimensions",
    "no_tokens": r"metrics are \['nll'\]: they need 'tokens'",
    "name_of_the_update": "returns a metric 'lr', and the update has one of that name",
    "metric_of_tokens": r"its metric 'nll' as a tensor without dimensions .* returns the shape",
    "name_of_the_run": r"metrics called \['seconds/step'\] come from two parts",
}

EARLY = ("other_role", "other_sync")


def run_mistakes(world: World, config: str, root: str) -> None:
    with start_reward_server() as server:

        def run(name: str) -> None:
            words = [f"flow={Path(__file__)}:{name}", f"run_dir={root}/{name}"]
            train(load_config(config, words), world, server)

        run("flow")
        for name, text in MISTAKES.items():
            # what a flow asks for before its steps is bad input, shown as one line
            with pytest.raises(ValueError if name in EARLY else FlowError, match=text):
                run(name)


def test_the_error_says_what_is_missing(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    config = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", steps=2)
    run_ranks(run_mistakes, 1, str(config), str(tmp_path), timeout_s=200)


def warnings_of(world: World, config: str) -> str:
    stream, log = io.StringIO(), logging.getLogger("spmdrl")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(stream))
    with start_reward_server() as server:
        train(load_config(config, [f"flow={Path(__file__)}:not_finite"]), world, server)
        train(load_config(config, [f"flow={Path(__file__)}:not_finite"]), world, server)
    return stream.getvalue()


def test_steps_that_change_nothing_and_runs_that_are_done_say_so(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    config = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", steps=2)
    (text,) = run_ranks(warnings_of, 1, str(config), timeout_s=200)
    assert text.count("changed no weight: no gradient of it was finite") == 2
    assert "all of steps=2 are done" in text
