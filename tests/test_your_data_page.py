"""docs/your-data.md: its file, reward, configuration and commands work as written, with a toy model
in place of the one it names.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spmdrl.observe.metrics import read_metrics
from test_adapter_page import run
from test_docs import ROOT, blocks
from tiny_model import make_tiny_model

PAGE = ROOT / "docs" / "your-data.md"


@pytest.mark.full
@pytest.mark.slow
def test_the_commands_of_the_page_train_and_show(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "models" / "SmolLM2-135M-Instruct", max_position_embeddings=2048)
    first = json.loads(blocks(PAGE, "json")[0].splitlines()[0])
    rows = [{**first, "question": f"{i}. {first['question']}"} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_reward.py").write_text(blocks(PAGE, "python")[0])
    (tmp_path / "mine.yaml").write_text(blocks(PAGE, "yaml")[0])
    check, train, show = blocks(PAGE, "bash")[0].splitlines()
    assert "mine.jsonl" in run(tmp_path, check)
    run(tmp_path, f"{train} steps=5 data.prompts_per_step=2 data.group_size=2 --fold")
    records = read_metrics(tmp_path / "runs/mine/metrics.jsonl")
    assert len([record for record in records if "rollout_tokens" in record]) == 5
    assert "reward" in run(tmp_path, show)
