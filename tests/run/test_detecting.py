"""A run that goes wrong is told of, or ends: saved, exported, done."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flow_cases import write_config
from harness import run_ranks
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.observe.metrics import merge_steps, read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model
from torchrun import attempt_of, outcome_of

ALWAYS = "rewards=[{function: 'ROOT/mine.py:always'}]"


def trained(world: World, root: str, words: list[str]) -> None:
    with start_reward_server() as server:
        train(load_config(f"{root}/c.yaml", words), world, server)


def test_flat_rewards_are_told_of_or_end_the_run(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "mine.py").write_text("def always(response):\n    return 1.0\n")
    write_config(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run", steps=5)
    flat = ALWAYS.replace("ROOT", str(tmp_path))
    run_ranks(trained, 2, str(tmp_path), [flat, "log.on_detect=stop", "checkpoint.export=true"])
    run = tmp_path / "run"
    steps = merge_steps(read_metrics(run / "metrics.jsonl"))
    assert [record["step"] for record in steps if "reward" in record] == [1, 2, 3]
    assert outcome_of(run) == "done"
    assert (attempt_of(run) / "stopped_by").read_text() == "the detector flat_reward\n"
    assert (run / "last_step").read_text() == "3\n"
    assert (run / "model" / "config.json").is_file()
    # the same run resumes where it ended, and continues to its last step if it is only warned
    run_ranks(trained, 2, str(tmp_path), [flat])
    assert (run / "last_step").read_text() == "5\n"
    assert outcome_of(run) == "done"
    assert not (attempt_of(run) / "stopped_by").exists()
    check_record(run, load_config(tmp_path / "c.yaml", [flat]))


def check_record(run: Path, config: Config) -> None:
    """run.json has both starts, and the directory stands for the last one's configuration."""
    first, last = json.loads((run / "run.json").read_text())["starts"]
    assert first["config"]["log"] == {**last["config"]["log"], "on_detect": "stop"}
    assert (first["ranks"], first["attempt"], last["attempt"]) == (
        *(2, "attempt_0000"),
        attempt_of(run).name,
    )
    assert first["versions"]["torch"] == torch.__version__
    assert load_config(run) == config
    assert load_config(run, ["steps=9"]).steps == 9
