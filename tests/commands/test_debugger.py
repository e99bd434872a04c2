"""A configuration for many ranks runs on one, under Python's debugger, without a launcher."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from spmdrl.commands.cli import main
from spmdrl.config.load import load_config
from spmdrl.flows import grpo
from spmdrl.observe.metrics import read_metrics
from spmdrl.placement import fold_text, place_roles
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fewer-ranks.md").read_text(encoding="utf-8")


@pytest.mark.full
def test_the_command_of_the_page_stops_at_a_breakpoint_and_goes_on(tmp_path: Path) -> None:
    line = re.findall(r"^python -m pdb (-m spmdrl train .* --fold)$", PAGE, re.M)
    make_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines, first = inspect.getsourcelines(grpo.grpo)
    number = first + next(i for i, text in enumerate(lines) if "trainer.step(" in text)
    debugger = [f"break {grpo.__file__}:{number}", "continue", "p (step, len(batch))", "continue"]
    words = [
        f"model.path={tmp_path / 'model'}",
        f"data.train.source={tmp_path / 'rows.jsonl'}",
        f"run_dir={tmp_path / 'run'}",
        *("data.prompts_per_step=4", "data.group_size=2", "sampling.max_tokens=4", "steps=1"),
        *("evaluation.held_out=0", "checkpoint.export=false"),
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pdb"),
            *(word for command in (*debugger, "quit") for word in ("-c", command)),
            *shlex.split(line[0]),
            *words,
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "(0, 8)" in said and "The program exited via sys.exit(). Exit status: 0" in said, said
    assert "folded from 4 ranks to 1: policy, reference: ranks 0-3 -> 0, dp_shard 2 -> 1" in said
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert [record["step"] for record in records] == [1]


def test_check_and_plan_tell_the_fold(tmp_path: Path, capsys) -> None:
    make_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    words = ["gsm8k_tp", "--ranks", "2", f"model.path={tmp_path / 'model'}"]
    assert main(["check", *words]) == 2
    refused = capsys.readouterr().err
    assert "roles.policy.tp=2" not in refused and "roles.rollout.tp=4 make 4 ranks" in refused
    assert "--fold" in refused
    told = "folded from 4 ranks to 2: policy, reference: ranks 0-3 -> 0-1, dp_shard 2 -> 1; "
    for command in ("check", "plan"):
        assert main([command, *words, "--fold"]) == 0
        captured = capsys.readouterr()
        assert (captured.out + captured.err).count(told) == 1, command


def test_the_page_shows_the_line_that_a_fold_prints() -> None:
    config = load_config(ROOT / "configs" / "gsm8k_disjoint.yaml", ["fold=true"])
    shown = re.findall(r"^folded from .*$", PAGE, re.M)
    assert shown == [fold_text(config, place_roles(config, 2), 2)]
