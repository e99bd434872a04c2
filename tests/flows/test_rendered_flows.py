"""`rollout.turns.history: rendered` in flows: the same on any layout, and `kept` where the template
rewrites nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_turn_flows import COUNTING, config_of, rows_of, trained

from harness import run_ranks
from saved_runs import CLOCKS, records
from spmdrl.commands.show import show
from spmdrl.observe.rollout_log import read_rollouts
from tiny_model import FORGETS, make_tiny_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turn_parts")
    make_tiny_model(root / "model")
    make_tiny_model(root / "forgetful", template=FORGETS)
    return root


def rendered(root: Path, name: str, flow: str = "grpo", **sections: Any) -> str:
    turns = {"kind": COUNTING, "max_turns": 3, "max_tokens": 200, "history": "rendered"}
    evaluation = {"before": False, "after": False, "held_out": 2}
    sections = {"rollout": {"turns": turns}, "evaluation": evaluation, **sections}
    return config_of(root, name, flow, **sections)


def forgetful(root: Path, name: str, flow: str = "grpo", **sections: Any) -> str:
    return rendered(root, name, flow, model={"path": str(root / "forgetful")}, **sections)


def test_samples_in_parts_train_alike_on_any_layout(root: Path) -> None:
    one = [forgetful(root, "one"), forgetful(root, "ppo", "ppo")]
    found, ppo = run_ranks(trained, 1, one, timeout_s=300)[0]
    roles = {"policy": {"tp": 2}, "rollout": {"tp": 2}}
    two = [forgetful(root, "two"), forgetful(root, "tp2", roles=roles)]
    others = run_ranks(trained, 2, two, timeout_s=300)[0]
    for lines in (found, ppo, *others):
        for record in lines:
            assert 1.5 < record["turns/parts"] <= record["turns/mean"] <= 3
            assert 0.7 < record["turns/in_parts"] <= 1 and record["turns/failed"] == 0
            # the engine and the trainer read the same contexts
            assert record["rollout_gap_max"] < 1e-4 and record["grad_norm"] > 0
    for name, lines in zip(("two", "tp2"), others, strict=True):
        for step, (record, wanted) in enumerate(zip(lines, found, strict=True), start=1):
            assert rows_of(root, name, step) == rows_of(root, "one", step), (name, step)
            for key in ("reward", "grad_norm", "loss", "turns/parts"):
                assert record[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-7), (name, key)
    (row, *_) = read_rollouts(root / "one", 1)
    parts = [turn["part"] for turn in row["turns"]]
    assert parts == list(range(1, len(parts) + 1)) and len(parts) > 1
    for turn in row["turns"][:-1]:
        assert turn["given"].startswith(f"<|im_start|>{row['opening'][0]['content']}<|im_end|>")
        assert f"<|im_end|><|im_start|>{turn['text'][-2:]}<|im_end|>" in turn["given"]
    shown = show(root / "one", 1, 0)
    assert f"--- part 2: the conversation, rendered ---\n{row['turns'][0]['given']}" in shown


@pytest.mark.full
def test_a_template_that_rewrites_nothing_trains_as_kept(root: Path) -> None:
    paths = [rendered(root, "rendered")]
    text = Path(paths[0]).read_text()
    kept = root / "kept.yaml"
    kept.write_text(
        text.replace("history: rendered", "history: kept").replace(
            str(root / "rendered"), str(root / "kept")
        )
    )
    run_ranks(trained, 1, [*paths, str(kept)], timeout_s=300)
    # which samples are computed together, and so last digits, depends on when answers arrive
    left_out = (*CLOCKS, "rollout_gap")
    found, wanted = (records(root / name, left_out) for name in ("rendered", "kept"))
    assert len(found) == 2
    for record in found:
        assert (record.pop("turns/parts"), record.pop("turns/in_parts")) == (1, 0)
    assert found == wanted
    for step in (1, 2):
        assert [row[:-1] for row in rows_of(root, "rendered", step)] == [
            row[:-1] for row in rows_of(root, "kept", step)
        ]
