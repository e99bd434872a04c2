"""Users' reward functions in a run: other trainers' styles, and what is refused at start."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from flow_cases import questions, write_config
from harness import run_ranks
from spmdrl.commands import train as start
from spmdrl.commands.check import check
from spmdrl.commands.evaluate import evaluate
from spmdrl.commands.train import train
from spmdrl.config.load import load_config
from spmdrl.config.user_objects import AgreedError
from spmdrl.observe.log import set_up_logging
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.world import World
from tiny_model import make_tiny_model
from torchrun import Torchrun

OWN = """
import itertools

_calls = itertools.count()

def loose(response, answer, **kwargs):
    assert kwargs["entry"]["question"] in kwargs["prompt"] and kwargs["level"] == len(answer)
    return float(len(response) % 2)

def four(prompt, response, answer, entry):
    return float(len(response) % 2)

def by_columns(response, question, level, hint=None):
    assert question.startswith("What") and level > 0
    return float(len(response) % 2)

def by_position(query, completion, solution, row):
    assert query == row["question"] and solution == row["answer"]
    return float(len(completion) % 2)

def trl(completions, **kwargs):
    return [0.0 for _ in completions]

def untyped(response):
    return None

def broken(response, answer):
    raise LookupError("no judge")

def gives_up(response, answer):
    if next(_calls) >= 2:
        return lookup(answer)
    return 0.0

def lookup(answer):
    raise LookupError("no judge of " + answer)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    make_tiny_model(root / "model")
    (root / "mine.py").write_text(OWN)
    data = questions(root / "sums.jsonl")
    rows = [json.loads(line) for line in (root / "sums.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "level": len(row["answer"])}) + "\n" for row in rows]
    (root / "sums.jsonl").write_text("".join(lines))
    evaluation = {
        "held_out": 4,
        "sets": {
            "other": {
                "data": {"source": str(root / "other.jsonl")},
                "rewards": [{"function": f"{root / 'mine.py'}:four"}],
            }
        },
    }
    (root / "other.jsonl").write_text('{"question": "Who?", "answer": "I"}\n' * 3)
    write_config(
        root / "c.yaml",
        root / "model",
        root / "run",
        steps=2,
        data=data,
        evaluation=evaluation,
        reward_pool={"timeout_s": 5.0},
    )
    return root


def rewards_of(world: World, root: str, names: list[str]) -> list[list[float]]:
    found = []
    with start_reward_server() as server:
        for name in names:
            words = [f"rewards=[{{function: '{root}/mine.py:{name}'}}]", f"run_dir={root}/{name}"]
            train(load_config(f"{root}/c.yaml", words), world, server)
            records = read_metrics(Path(root, name, "metrics.jsonl"))
            found.append([r["reward"] for r in records if "loss" in r])
            assert all(r["reward_failed"] == 0.0 for r in records if "loss" in r)
    return found


def test_functions_of_each_style_work_unchanged(root: Path) -> None:
    names = ["four", "loose", "by_columns", "by_position"]
    found = run_ranks(rewards_of, 2, str(root), names, timeout_s=300)
    assert len(found[0]) == 4 and len(found[0][0]) == 2
    assert all(rewards == found[0][0] for rank in found for rewards in rank)


REFUSED = {
    "trl": (["rewards=[{function: 'ROOT/mine.py:trl'}]"], r"it takes \(completions, \*\*kwargs\)"),
    "untyped": (["rewards=[{function: 'ROOT/mine.py:untyped'}]"], "it returned a NoneType"),
    "broken": (["rewards=[{function: 'ROOT/mine.py:broken'}]"], "LookupError: no judge"),
    "options": (
        ["rewards=[{function: 'ROOT/mine.py:four', options: {size: 1}}]"],
        "its options have 'size'",
    ),
    "of a set": (
        ["evaluation.sets.other.rewards=[{function: 'ROOT/mine.py:by_columns'}]"],
        r"'level' is neither one of .* nor a column of the row \(answer, question\)",
    ),
    "flow": (["flow=ROOT/mine.py:lookup2"], "has no 'lookup2'"),
}


def refusals(world: World, root: str) -> list[tuple[str, float]]:
    """Each case's error on this rank and the seconds to it; no role is made."""
    found = []

    def no_roles(*given: Any) -> None:
        raise AssertionError("the model would be loaded")

    start.assemble = no_roles  # type: ignore[assignment]
    with start_reward_server() as server:
        for words, _ in REFUSED.values():
            began = time.monotonic()
            with pytest.raises(AgreedError) as refused:
                train(
                    load_config(f"{root}/c.yaml", [w.replace("ROOT", root) for w in words]),
                    world,
                    server,
                )
            found.append((str(refused.value), time.monotonic() - began))
    return found


def test_what_cannot_serve_is_refused_before_the_model_is_loaded(root: Path) -> None:
    first, second = run_ranks(refusals, 2, str(root), timeout_s=300)
    for name, (message, seconds), (other, _) in zip(REFUSED, first, second, strict=True):
        with pytest.raises(ValueError, match=REFUSED[name][1]):
            raise ValueError(message)
        assert message == other and not message.startswith("rank ")
        assert "\n" not in message or name == "broken"
        assert seconds < 20.0
        print(f"{name}: {seconds:.2f} s")


def failures(world: World, root: str) -> tuple[str, str]:
    """Return a rank's log and the error when functions fail in the first step."""
    stream = io.StringIO()
    set_up_logging(world.rank, stream=stream)
    words = [
        f"rewards=[{{function: '{root}/mine.py:gives_up'}}]",
        f"run_dir={root}/failing",
        "reward_pool.max_failed_share=0.5",
        "evaluation.before=false",
    ]
    with start_reward_server() as server, pytest.raises(AgreedError) as failed:
        train(load_config(f"{root}/c.yaml", words), world, server)
    return stream.getvalue(), str(failed.value)


def test_failures_of_a_step_are_said_once_over_all_ranks(root: Path) -> None:
    (log, error), (other_log, other_error) = run_ranks(failures, 2, str(root), timeout_s=300)
    assert error == other_error
    assert error.startswith("in step 1: rank 0: reward 'gives_up' (")
    assert "calls failed (reward_pool.max_failed_share=0.5" in error
    assert error.count("in lookup\n") == 1 and "Traceback" not in error
    assert "spmdrl/" not in error.partition("\n")[2]
    assert "gives_up" not in other_log
    assert "gives_up:" not in log  # the error says it


@pytest.mark.parametrize("name", ["trl", "untyped", "broken", "of a set", "flow"])
def test_a_check_without_a_run_says_the_same(root: Path, name: str) -> None:
    words, message = REFUSED[name]
    config = load_config(root / "c.yaml", [word.replace("ROOT", str(root)) for word in words])
    with pytest.raises(ValueError, match=message):
        check(config, 2)


def scores(world: World, root: str) -> dict[str, float]:
    """`spmdrl eval` does not use the training rewards, which fit no row of the set."""
    words = [
        f"rewards=[{{function: '{root}/mine.py:by_columns'}}]",
        "evaluation.held_out=0",
        f"run_dir={root}/eval",
    ]
    with start_reward_server() as server:
        return evaluate(load_config(f"{root}/c.yaml", words), world, server)


def test_evaluation_has_functions_of_its_own(root: Path) -> None:
    (found,) = run_ranks(scores, 1, str(root), timeout_s=200)
    assert "eval/other/reward" in found


@pytest.mark.full  # as tests/flows/test_bad_input.py's of another error
def test_a_refusal_is_one_line_of_all_ranks(root: Path) -> None:
    words = [f"rewards=[{{function: '{root / 'mine.py'}:trl'}}]", f"run_dir={root / 'torchrun'}"]
    with Torchrun(root / "c.yaml", *words, log=root / "torchrun.log") as job:
        assert job.wait(120.0) == 1  # torchrun's own
        output = job.output()
    assert output.count("spmdrl train: error:") == 1
    (line,) = [line for line in output.splitlines() if line.startswith("spmdrl train: error:")]
    assert "mine.py:trl): it takes (completions, **kwargs)" in line
