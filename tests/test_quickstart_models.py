"""`scripts/quickstart.sh --model`: which model it obtains, and which configuration it trains."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from spmdrl.config.load import load_config

ROOT = Path(__file__).parents[1]


def quickstart(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a directory whose commands only write down what they are asked."""
    (root / "scripts").mkdir()
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "quickstart.sh", root / "scripts")
    for name in ("scripts/setup.sh", "scripts/get_model.sh", ".venv/bin/python"):
        (root / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {root}/asked\n')
        (root / name).chmod(0o755)
    command = ["bash", str(root / "scripts" / "quickstart.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"RANKS": "2"})


@pytest.mark.parametrize(
    ("words", "model", "config"),
    [
        ((), "SmolLM2-135M-Instruct", "quickstart"),
        (("adapter",), "SmolLM2-135M-Instruct", "quickstart_adapter"),
        (("--model", "gemma3-270m"), "gemma-3-270m", "quickstart_gemma"),
    ],
)
def test_the_first_words_choose_model_and_configuration(
    tmp_path: Path, words: tuple[str, ...], model: str, config: str
) -> None:
    done = quickstart(tmp_path, *words, "steps=2")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[1] == f"scripts/get_model.sh {model}"
    assert f" train configs/{config}.yaml run_dir=" in asked[2] and asked[2].endswith(" steps=2")
    [run_dir] = [word for word in asked[2].split() if word.startswith("run_dir=runs/")]
    assert f" report {run_dir.removeprefix('run_dir=')} --seconds " in asked[3]
    assert load_config(config).model.path == f"models/{model}"


def test_a_model_that_it_does_not_know_is_refused_before_anything_else(tmp_path: Path) -> None:
    done = quickstart(tmp_path, "--model", "gemma3-27b")
    assert done.returncode == 2 and "no model 'gemma3-27b'" in done.stderr
    assert not (tmp_path / "asked").exists()


def test_a_model_without_a_chat_template_reads_questions_as_text() -> None:
    config = load_config("quickstart_gemma")
    [source] = [config.data.train]
    assert (source.chat, source.template) == (False, "Question: {prompt}\nAnswer:")
    assert config.roles["policy"].adapter is not None
