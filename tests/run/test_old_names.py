"""A run directory whose checkpoint has keys by their old names resumes as if they were the new."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from flow_cases import run_configs, write_config
from harness import run_ranks
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
