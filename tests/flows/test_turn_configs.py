"""Shipped configurations whose samples take turns run three steps with a toy model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flow_cases import run_configs
from harness import run_ranks
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
NAMES = ("textarena", "reasoning_gym_feedback", "tools/grpo")


PARSER = '''
from spmdrl.api import ToolCall, ToolCalls


def all_of_it(text):
    """Read a turn as a call of the calculator, whatever a toy model writes."""
    call = ToolCall(name="calculator", arguments={"expression": text})
    return ToolCalls(text="", calls=(call,))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turns")
    make_tiny_model(root / "model", max_position_embeddings=2048)
    settings = json.loads((root / "model" / "tokenizer_config.json").read_text())
    settings["chat_template"] = (ROOT / "scripts" / "examples" / "tools.jinja").read_text()
    (root / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(40)]
    for file, part in (("questions", rows[:30]), ("held_out", rows[30:])):
        (root / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (root / "parser.py").write_text(PARSER)
    return root


def overrides(name: str, root: Path, run_dir: Path) -> list[str]:
    """A few short samples; turns and their limits stay as shipped."""
    words = [
        "steps=3",
        f"run_dir={run_dir}",
        f"model.path={root / 'model'}",
        *("data.prompts_per_step=2", "data.group_size=3", "sampling.max_tokens=6"),
        "sampling.temperature=1",  # a group whose rewards are equal would be no step
        *("train.lr=1e-3", "train.warmup_steps=0", "rollout.turns.workers=1"),
        *("evaluation.before=false", "evaluation.after=false"),
        f"rewards=[{{function: '{ROOT / 'tests' / 'toy_rewards.py'}:even_length'}}]",
        "log.rollouts=1",
    ]
    if name != "tools/grpo":
        return words
    return [
        *words,
        f"data.train.source={root / 'questions.jsonl'}",
        f"evaluation.sets.held_out.data.source={root / 'held_out.jsonl'}",
        f"rollout.turns.options.format={root / 'parser.py'}:all_of_it",
    ]


def test_configurations_with_turns_run_three_steps(place: Path, tmp_path: Path) -> None:
    cases = [
        (str(CONFIGS / f"{name}.yaml"), overrides(name, place, tmp_path / str(number)))
        for number, name in enumerate(NAMES)
    ]
    found = run_ranks(run_configs, 1, cases, str(tmp_path), timeout_s=200)[0]
    for name, records in zip(NAMES, found, strict=True):
        assert len(records) == 3, name
        assert max(record["turns/mean"] for record in records) > 1, name
        assert all(record["turns/failed"] == 0 for record in records), name
    # a toy model calls in every turn, and writes no arithmetic
    for record in found[-1]:
        assert (
            record["turns/tool_calls"] == record["turns/mean"] and record["turns/valid_calls"] == 0
        )
