"""Data and figures of scripts/examples/tools.sh: its traces are calls that the calculator answers,
and its chat template writes them as the parser reads them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.turns.tool_calls import format_of
from spmdrl.turns.tools import ToolEnvironment
from tiny_model import make_tiny_model

SCRIPTS = Path(__file__).parents[2] / "scripts" / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the script fills."""
    root = tmp_path_factory.mktemp("tools")
    make_tiny_model(root / "model", max_position_embeddings=2048)
    with pytest.MonkeyPatch.context() as patch:
        words = ["--traces", "12", "--questions", "20", "--held-out", "6"]
        patch.setattr(
            sys, "argv", ["tools_data.py", str(root / "model"), str(root / "out"), *words]
        )
        script("tools_data").main()
    return root / "out"


def test_questions_are_new_and_have_answers_that_the_tool_finds(made: Path) -> None:
    traces, direct = read(made / "traces.jsonl"), read(made / "direct.jsonl")
    asked = [*read(made / "questions.jsonl"), *read(made / "held_out.jsonl")]
    questions = [row["messages"][0]["content"] for row in traces]
    assert len(asked) == 26 and len({*questions, *(row["question"] for row in asked)}) == 38
    for row, other in zip(traces, direct, strict=True):
        _, call, result, said = row["messages"]
        (made_call,) = call["tool_calls"]
        expression = made_call["function"]["arguments"]["expression"]
        assert result["content"] == str(eval(expression))
        assert said["content"] == f"The answer is {result['content']}."
        assert other["messages"] == [row["messages"][0], said]


def test_the_template_writes_what_the_parser_reads(made: Path) -> None:
    tokenizer = load_tokenizer(made / "model")
    assert format_of(tokenizer.chat_template) == "hermes"
    row = read(made / "traces.jsonl")[0]
    text = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
    system, user, call, result, said, _ = text.split("<|im_end|>\n")
    assert "calculator(expression)" in system and user.endswith(row["messages"][0]["content"])
    found = ToolEnvironment(["calculator"], "hermes").step(call)
    assert found.metrics == {"tool_calls": 1, "valid_calls": 1}
    content = found.messages[0]["content"]
    assert result == f"<|im_start|>tool\n{content}"
    assert said == f"<|im_start|>assistant\nThe answer is {content}."
    assert (made / "model" / "model.safetensors").is_symlink()


def test_the_figures_of_a_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def write(file: Path, *records: dict[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": i, **record}) + "\n" for i, record in enumerate(records)]
        file.write_text("".join(lines))

    def sample(prompt: int, reward: float, expression: str) -> dict[str, Any]:
        arguments = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
        response = f"<tool_call>{arguments}</tool_call>\nThe answer is 3."
        return {"prompt_id": prompt, "reward": reward, "response": response}

    accuracy = "eval/held_out/accuracy"
    write(tmp_path / "grpo/metrics.jsonl", {accuracy: 0.25}, {"loss": 1}, {accuracy: 0.75})
    write(tmp_path / "grpo_without/metrics.jsonl", {accuracy: 0.0})
    held_out = tmp_path / "grpo/evaluation"
    write(held_out / "held_out_00000000.jsonl", *(sample(i, float(i < 1), "1") for i in range(4)))
    last = [sample(i, float(i < 3), "1+" if i == 3 else "1+2") for i in range(4)]
    write(held_out / "held_out_00000016.jsonl", *last)
    words = ["figures", str(tmp_path), "--seconds", "7"]
    monkeypatch.setattr(sys, "argv", ["tools_summary.py", *words])
    assert script("tools_summary").main() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    # gains of 0, 1, 1, 0: a variance of 1/3 over 4 questions
    assert figures.pop("standard_error") == pytest.approx((1 / 12) ** 0.5)
    assert figures == {
        "accuracy_sft": 0.25,
        "accuracy_after": 0.75,
        "accuracy_without_tool": 0.0,
        "valid_calls": 0.75,
        "seconds": 7.0,
    }
