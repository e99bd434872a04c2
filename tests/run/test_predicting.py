"""Predictions compared with measurements, and machine files that are made of these."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flow_cases import write_config
from harness import run_ranks
from spmdrl.commands.cli import main
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.observe import names
from spmdrl.observe.metrics import read_metrics
from spmdrl.planning.forecast.calibrate import PLAN_FILE, calibrated, read_run
from spmdrl.planning.forecast.machines import load_machine
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model


def run_once(world: World, config: str, words: list[str]) -> list[str]:
    """Run a configuration; what its log says of predictions."""
    said: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.endswith("predicting"):
                said.append(record.getMessage())

    note = Note()
    logger = logging.getLogger("spmdrl")
    logger.addHandler(note)
    logger.setLevel(logging.INFO)
    with start_reward_server() as server:
        train(load_config(config, words), world, server)
    logger.removeHandler(note)
    return said


def test_a_run_tells_its_prediction_and_a_machine_file_is_made_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_model(tmp_path / "model")
    config = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    [[said]] = run_ranks(run_once, 1, str(config), ["steps=4"])
    assert said.startswith("predicted / measured"), said
    shown = re.findall(r"^  (\w+) +([\d.]+) / ([\d.]+)", said, re.M)
    assert {"rollout", "update", "step"} <= {name for name, _, _ in shown}
    assert all(float(measured) >= 0 for _, _, measured in shown)

    first, *later = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert names.MFU not in first  # this host is measured after the second step
    for record in later:
        assert 0 < record[names.MFU] < 1
        seconds = {n: record[names.SECONDS + n] for n in ("rollout", "update", "step")}
        parts = sum(record[names.TFLOPS + n] * seconds[n] for n in ("rollout", "update"))
        whole = record[names.TFLOPS + "step"] * seconds["step"]
        assert parts == pytest.approx(whole)
        drawn = record["lengths/prompt"] + record["lengths/response"]
        tokens = record[names.TOKENS_PER_RANK] * seconds["step"]
        assert tokens == pytest.approx(record["samples"] * drawn)

    run = read_run(tmp_path / "run")
    assert len(run.records) == 3
    lengths = run.lengths(run.records[0])
    assert lengths.prompt > 0
    assert 0 < lengths.response <= lengths.longest == 10
    assert main(["plan", "--calibrate", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"plan with it: spmdrl plan CONFIG --gpu {tmp_path / 'run' / 'machine.yaml'}" in said
    machine = calibrated(tmp_path / "run")
    measured, predicted = run.measured(), run.predicted(machine)
    for phase in ("rollout", "update"):
        assert predicted[phase] == pytest.approx(measured[phase], rel=1e-3)
    assert machine.process_bytes > 10**8
    file = tmp_path / "run" / "machine.yaml"
    again = load_machine(file, num_nodes=1, devices_per_node=1)
    assert again.phase_shares == pytest.approx(machine.phase_shares)
    assert run.predicted(again)["step"] == pytest.approx(predicted["step"])

    # a run takes it in place of what it would measure
    words = [f"machine={file}", "steps=3", f"run_dir={tmp_path / 'next'}"]
    [[said]] = run_ranks(run_once, 1, str(config), words)
    other = read_run(tmp_path / "next").machine
    assert other.phase_shares == pytest.approx(machine.phase_shares)
    assert replace(other, process_bytes=0).device == replace(again, process_bytes=0).device


def test_a_directory_without_enough_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{PLAN_FILE} does not exist: a run writes it"):
        calibrated(tmp_path)


def test_a_machine_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    config = write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run")
    with pytest.raises(Exception, match=r"machine=h101: .*did you mean"):
        run_ranks(run_once, 1, str(config), ["machine=h101"])
