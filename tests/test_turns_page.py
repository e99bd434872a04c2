"""What docs/turns.md shows runs as it is written, with a toy model in place of the one it names."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from spmdrl.config.turns import TurnsSection
from spmdrl.observe.metrics import read_metrics
from spmdrl.turns.kinds import KINDS
from spmdrl.turns.tools import ToolEnvironment
from test_adapter_page import run
from test_docs import ROOT, blocks
from tiny_model import make_tiny_model

PAGE = ROOT / "docs" / "turns.md"
TOOLS = '''
def look_up(word: str) -> str:
    """Look up a word.

    Args:
        word: the word
    """
    return word.upper()


def make_search(k: int):
    def search(words: str) -> list[str]:
        """Search.

        Args:
            words: what for
        """
        return words.split()[:k]

    return search
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the page has the reader write, and a toy model."""
    root = tmp_path_factory.mktemp("checkout")
    make_tiny_model(root / "models" / "SmolLM2-135M-Instruct", max_position_embeddings=2048)
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "my_game.py").write_text(blocks(PAGE, "python")[0])
    (root / "guess.yaml").write_text(blocks(PAGE, "yaml")[0])
    (root / "my_tools.py").write_text(TOOLS)
    return root


def small(line: str) -> str:
    """A training command with a few short samples on one rank."""
    sizes = "data.prompts_per_step=2 data.group_size=2 evaluation.held_out=2"
    return f"{line} steps=3 {sizes} --fold" if " train " in line else line


@pytest.mark.full
@pytest.mark.slow
def test_the_game_of_the_page_is_trained_on_and_shown(checkout: Path) -> None:
    commands = blocks(PAGE, "bash")[0].splitlines()
    said = [run(checkout, small(line)) for line in commands]
    records = read_metrics(checkout / "runs/guess/metrics.jsonl")
    assert len([record for record in records if "rollout_tokens" in record]) == 3
    assert "Less." in said[-1] or "More." in said[-1]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in blocks(PAGE, "bash")[1].splitlines() if c])
def test_the_shipped_environments_run_three_steps(checkout: Path, line: str) -> None:
    name = Path(line.split()[-1]).stem
    run(checkout, small(line))
    records = read_metrics(checkout / "runs" / name / "metrics.jsonl")
    assert len([record for record in records if "rollout_tokens" in record]) == 3


@pytest.mark.full
@pytest.mark.slow
def test_the_tutorial_goes_from_nothing_to_its_figures(checkout: Path) -> None:
    [line] = blocks(PAGE, "bash")[2].splitlines()
    (checkout / "scripts").mkdir()
    shutil.copytree(ROOT / "scripts" / "examples", checkout / "scripts" / "examples")
    (checkout / ".venv").symlink_to(sys.prefix)
    for name in ("setup.sh", "get_model.sh"):  # what they install and download exists already
        (checkout / "scripts" / name).write_text("#!/bin/sh\n")
        (checkout / "scripts" / name).chmod(0o755)
    sizes = "steps=2 data.prompts_per_step=2 data.group_size=2 evaluation.sets.held_out.max_items=6"
    said = run(checkout, f"SFT_STEPS='1 2' RANKS=1 {line} --out runs/tools {sizes}")
    figures = json.loads(said.splitlines()[-1])
    assert set(figures) == {
        *("accuracy_sft", "accuracy_after", "accuracy_without_tool"),
        *("standard_error", "valid_calls", "seconds"),
    }
    for stage, steps in (("sft", 2), ("grpo", 2), ("sft_without", 2), ("grpo_without", 2)):
        records = read_metrics(checkout / "runs/tools" / stage / "metrics.jsonl")
        # GRPO of a model that answers nothing right has no loss
        shown = "rollout_tokens" if "grpo" in stage else "loss"
        assert len([record for record in records if shown in record]) == steps, stage


def test_the_tools_of_the_page_are_found(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    options = yaml.safe_load(blocks(PAGE, "yaml")[1])["rollout"]["turns"]["options"]
    options["functions"][1]["python"]["sandbox"] = "none"  # this host may have no namespaces
    tools = ToolEnvironment(**options, format="hermes")
    names = [schema["function"]["name"] for schema in tools.tools()]
    assert names == ["calculator", "python", "look_up", "search"]
    call = json.dumps({"name": "search", "arguments": {"words": "a b c d"}})
    (message,) = tools.step(f"<tool_call>{call}</tool_call>").messages
    assert message["content"] == '["a", "b", "c"]'


def test_the_page_names_the_kinds_and_keys_that_there_are() -> None:
    page = PAGE.read_text()
    kinds = page[page.index("| kind |") : page.index("`gymnasium` takes any")]
    assert re.findall(r"^\| `(\w+)` \|", kinds, re.M) == list(KINDS)
    limits = page[page.index("| key of `rollout.turns`") : page.index("A step that raises")]
    named = set(re.findall(r"`(\w+)`", limits)) - {"turns"}
    assert named <= set(TurnsSection.model_fields)
