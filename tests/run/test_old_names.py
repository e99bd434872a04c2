"""A run directory whose checkpoint has keys by their old names resumes as if they were the new."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.commands.migrate import migrate
from spmdrl.config.load import load_config
from spmdrl.world import World
from tiny_model import make_tiny_model

OLD = {"residency": "memory", "share": "part"}


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def resume(world: World, config: str, replay: str) -> tuple[list[int], list[str], list[str]]:
    """Train one step, give the saved configuration old names, train one more, and one with another
    value: the steps that were trained, and the two starts' warnings on values.
    """
    run_configs(world, [(config, ["steps=1"])], replay)
    index = max(Path(config).parent.glob("run/checkpoints/*/checkpoint.json"))
    content = json.loads(index.read_text(encoding="utf-8"))
    saved = content["state"]["config"]
    for section in (*saved["roles"].values(), saved["data"]["train"]):
        for new, old in OLD.items():
            if new in section:
                section[old] = section.pop(new)
    assert "memory" in saved["roles"]["policy"] and saved["data"]["train"]["part"] == "1-2/2"
    index.write_text(json.dumps(content), encoding="utf-8")
    heard = []
    steps: list[int] = []
    for words in (["steps=2"], ["steps=3", "roles.policy.residency.optimizer=keep"]):
        listener = Warnings()
        logging.getLogger("spmdrl").addHandler(listener)
        (records,) = run_configs(world, [(config, words)], replay)
        logging.getLogger("spmdrl").removeHandler(listener)
        steps = [int(record["step"]) for record in records]
        heard.append([text for text in listener.texts if "other values" in text])
    return steps, heard[0], heard[1]


def test_a_checkpoint_with_old_names_resumes(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    roles = {"policy": {"residency": {"optimizer": "host"}}, "rollout": {}}
    data: dict[str, Any] = {
        "train": {"source": "reasoning_gym:chain_sum", "size": 40, "max_tokens": 96}
    }
    data["train"]["share"] = "1-2/2"
    config = write_config(
        *(tmp_path / "c.yaml", tmp_path / "model", tmp_path / "run"),
        roles=roles,
        data={**data, "prompts_per_step": 4, "group_size": 2},
    )
    steps, same, other = run_ranks(resume, 1, str(config), str(tmp_path), timeout_s=200)[0]
    assert steps == [0, 1, 2] or steps == [1, 2, 3]
    assert same == []
    assert len(other) == 1 and "roles.policy.residency.optimizer was" in other[0]


OF_0_1 = Path(__file__).parent / "of_0_1"
"""A run of version 0.1, stopped while it sampled in step 2, with its model, data and reward."""


def resume_0_1(world: World, place: str) -> tuple[list[int], list[str]]:
    os.chdir(place)
    listener = Warnings()
    logging.getLogger("spmdrl").addHandler(listener)
    (records,) = run_configs(world, [("config.yaml", [])], place)
    return [int(record["step"]) for record in records], listener.texts


def test_a_run_directory_of_0_1_resumes_within_its_step(tmp_path: Path) -> None:
    place = tmp_path / "old"
    shutil.copytree(OF_0_1, place)
    config = place / "config.yaml"
    with pytest.raises(ValueError, match=r"memory.*residency"):
        load_config(str(config))
    assert len(list(migrate(config))) == 2
    [(steps, warnings)] = run_ranks(resume_0_1, 1, str(place), timeout_s=200)
    assert steps == [1, 2, 3]
    assert not [text for text in warnings if "other" in text or "anew" in text]
