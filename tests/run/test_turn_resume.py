"""A run that is stopped, or killed, within its samples' turns equals one that never was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_exact_resume import CLOCKS, records, run_stopped, weights

from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import FORGETS, make_tiny_model
from torchrun import attempt_of

LEFT_OUT = (*CLOCKS, "rollout_gap")
"""Which samples are computed together depends on when answers arrive: in the last digits, so do the
engine's log-probabilities, which these runs do not train on."""

PLACE = Path(__file__).parents[1] / "turn_environments.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turn_resume")
    make_tiny_model(root / "model")
    make_tiny_model(root / "forgetful", template=FORGETS)
    return root


def config_of(root: Path, name: str, kind: str, *, parts: bool = False, **options: Any) -> str:
    """Args:
    parts: whether the chat template rewrites turns, and samples have parts.
    """
    turns = {"kind": f"{PLACE}:{kind}", "options": options, "max_turns": 3, "max_tokens": 70}
    if parts:
        turns |= {"max_tokens": 200, "history": "rendered"}
    path = write_config(
        root / f"{name}.yaml",
        root / ("forgetful" if parts else "model"),
        root / name,
        steps=2,
        rewards=[],
        data={**questions(root / "q.jsonl", 12), "prompts_per_step": 2, "group_size": 2},
        sampling={"max_tokens": 6},
        rollout={"turns": turns},
        algorithm={"credit": "turn"},
        checkpoint={"export": False, "every": 1},
    )
    return str(path)


def same(found: Path, whole: Path) -> None:
    for line, expected in zip(records(found, LEFT_OUT), records(whole, LEFT_OUT), strict=True):
        differing = {k for k in line | expected if line.get(k) != expected.get(k)}
        assert not differing, (found, line["step"], differing)
    tensors, wanted = weights(found), weights(whole)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        pytest.param("Counting", False, marks=pytest.mark.full),
        ("Saving", False),
        pytest.param("Saving", True, marks=pytest.mark.full),
    ],
)
def test_a_stop_within_turns_resumes_exactly(root: Path, kind: str, parts: bool) -> None:
    base = root / f"{kind}_{parts}"
    config = config_of(root, base.name, kind, parts=parts)
    stops = ["9", "14"] if kind == "Counting" else ["14"]
    (names,) = run_ranks(run_stopped, 1, config, base, stops, [], timeout_s=300)
    polls = int(next(attempt_of(base / "0").glob("polls_*")).read_text())
    assert polls > 2 * 14, "both stops are within the first step's turns"
    for stop, saved in zip(stops, names[1:], strict=True):
        assert len(saved) == 1, (stop, saved)
        same(base / stop, base / "0")
    if parts:
        assert all(line["turns/parts"] > 1.5 for line in records(base / "0"))


def once(world: World, config: str) -> None:
    with start_reward_server() as server:
        train(load_config(config), world, server)


@pytest.mark.parametrize("parts", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_rank_killed_within_turns_resumes_exactly(root: Path, parts: bool) -> None:
    armed = root / "armed"
    names = [f"{name}_{parts}" for name in ("whole", "killed")]
    options = {"parts": parts, "armed": str(armed)}
    whole, killed = (config_of(root, name, "Killing", **options) for name in names)
    run_ranks(once, 1, whole)
    armed.touch()
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(once, 1, killed)
    assert not armed.exists() and not records(root / names[1])
    run_ranks(once, 1, killed)
    same(root / names[1], root / names[0])
