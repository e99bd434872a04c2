"""Flows whose samples take turns: GRPO, PPO and online DPO, on several layouts, over stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.commands.show import show
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.observe.metrics import read_metrics
from spmdrl.observe.rollout_log import read_rollouts
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model

HERE = Path(__file__).parents[1]
COUNTING, SAVING = (f"{HERE / 'turn_environments.py'}:{name}" for name in ("Counting", "Saving"))

ROLES: dict[str, dict[str, Any]] = {
    "grpo": {"policy": {}, "rollout": {}},
    "ppo": {"policy": {}, "rollout": {}, "value": {"head": "zero"}, "reference": {}},
    "online_dpo": {"policy": {}, "rollout": {}, "reference": {}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turn_flows")
    make_tiny_model(root / "model")
    return root


def config_of(root: Path, name: str, flow: str = "grpo", **sections: Any) -> str:
    algorithm = {"credit": "turn"} if flow != "online_dpo" else {}
    algorithm |= {"kl_coef": 0.1} if flow == "ppo" else {}
    path = write_config(
        root / f"{name}.yaml",
        root / "model",
        root / name,
        **{
            "flow": flow,
            "steps": 2,
            "roles": ROLES[flow],
            "rewards": [],
            "data": {**questions(root / "questions.jsonl", 12), "prompts_per_step": 2},
            "sampling": {"max_tokens": 6},
            "rollout": {"turns": {"kind": COUNTING, "max_turns": 3, "max_tokens": 70}},
            "algorithm": algorithm,
            "evaluation": {
                "held_out": 3,
                "before": flow == "grpo",
                "after": False,
                "threshold": 2.4,
            },
            "log": {"rollouts": 1, "tensorboard": False, "progress": False},
            **sections,
        },
    )
    return str(path)


def trained(world: World, paths: list[str]) -> list[list[dict[str, float]]]:
    found = []
    with start_reward_server() as server:
        for path in paths:
            config = load_config(path)
            train(config, world, server)
            found.append(read_metrics(Path(config.run_dir) / "metrics.jsonl"))
    return found


def rows_of(root: Path, name: str, step: int) -> list[tuple[Any, ...]]:
    names = ("prompt_id", "sample", "reward", "finish", "response", "ending")
    return [
        (*(row[name] for name in names), str(row["turns"]))
        for row in read_rollouts(root / name, step)
    ]


def test_flows_take_turns_on_any_layout(root: Path) -> None:
    one = [config_of(root, f"{flow}_1", flow) for flow in ROLES]
    spread = {"roles": {"policy": {}, "rollout": {"tp": 2}}}
    found = dict(zip(ROLES, run_ranks(trained, 1, one, timeout_s=300)[0], strict=True))
    two = [config_of(root, "grpo_2"), config_of(root, "grpo_tp", **spread)]
    run_ranks(trained, 2, two, timeout_s=300)
    evaluated = found["grpo"].pop(0)
    assert 0 <= evaluated["eval/held_out/accuracy"] < 1, "turns alone give rewards to be right by"
    assert 1 < evaluated["eval/held_out/turns/mean"] <= 3
    for flow, records in found.items():
        assert [r["step"] for r in records] == [1, 2], flow
        for record in records:
            assert 1 < record["turns/mean"] <= 3 and record["turns/failed"] == 0
            assert record["turns/restarted"] == record["turns/remade"] == 0
            assert record["reward"] == pytest.approx(record["reward/turns"])
            assert record["turns/given_tokens"] > 5
            ends = record["turns/cut_by_turns"] + record["turns/cut_by_room"]
            assert ends == pytest.approx(record["cut_fraction"])
        assert records[0]["grad_norm"] > 0
        # the first step's samples are the same: the flows differ in what they make of them
        assert rows_of(root, f"{flow}_1", 1) == rows_of(root, "grpo_1", 1)
    for name in ("grpo_2", "grpo_tp"):
        for step in (1, 2):
            assert rows_of(root, name, step) == rows_of(root, "grpo_1", step), (name, step)
    (row, *_) = read_rollouts(root / "grpo_1", 1)
    assert "<|im_end|>" in row["turns"][0]["given"] and row["turns"][-1]["given"] == ""
    shown = show(root / "grpo_1", 1, 0)
    assert row["opening"] == [{"role": "user", "content": "Count: What is " + row["prompt"][8:12]}]
    assert f"--- prompt, user ---\n{row['opening'][0]['content']}\n--- turn 1" in shown
    assert row["prompt"] not in shown, "the model has not seen the data's"
    for number, turn in enumerate(row["turns"], start=1):
        assert f"--- turn {number}, reward {turn['reward']:.4g} ---\n{turn['text']}" in shown
    assert f"of them: {row['ending']}" in shown
