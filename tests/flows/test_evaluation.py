"""Several held-out sets in a run and alone: own rewards, sampling, opponent, on 1 and 2 ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flow_cases import run_configs, write_config
from harness import run_ranks
from spmdrl.commands.evaluate import evaluate
from spmdrl.config.load import load_config
from spmdrl.observe.metrics import read_metrics
from spmdrl.rewards.server import start_reward_server
from spmdrl.run.assembly.factories import make_stream
from spmdrl.run.inputs import read_inputs
from spmdrl.world import World
from tiny_model import make_tiny_model

LENGTH = f"{Path(__file__).parents[1] / 'toy_rewards.py'}:length"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    make_tiny_model(root / "model")
    rows = [{"q": f"How far is {i}?", "a": "5"} for i in range(20)]
    (root / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = [{"q": f"How old is {i}?", "a": "7"} for i in range(6)]
    (root / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    return root


def config_of(root: Path, name: str, **evaluation: Any) -> Path:
    columns = {"prompt_column": "q", "answer_column": "a"}
    sets = {
        "other": {
            "data": {"source": str(root / "other.jsonl"), **columns},
            "rewards": [{"function": LENGTH}],
            "sampling": {"max_tokens": 6},
            "num_samples": 3,
            "k": [1, 3],
            "threshold": 0.05,
            "against": "start",
        },
        "greedy": {"data": {"source": str(root / "other.jsonl"), "size": 4, **columns},
                   "sampling": {"temperature": 0}},
    }  # fmt: skip
    return write_config(
        root / f"{name}.yaml",
        root / "model",
        root / name,
        steps=2,
        data={"mix": [{"source": str(root / "more.jsonl"), "weight": 0.5, **columns}]},
        evaluation={"held_out": 4, "every": 1, "sets": sets, **evaluation},
        log={"tensorboard": True},
    )


@pytest.fixture(scope="module")
def runs(root) -> dict[int, list[dict[str, float]]]:
    """Ranks -> the records of the evaluations before, between and after two steps."""
    found = {}
    for ranks in (1, 2):
        config = config_of(root, f"run_{ranks}")
        run_ranks(run_configs, ranks, [(str(config), [])], str(root), timeout_s=200)
        records = read_metrics(root / f"run_{ranks}" / "metrics.jsonl")
        found[ranks] = [r for r in records if "eval/held_out/accuracy" in r]
    return found


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_set_is_measured_with_its_own_settings(runs, root):
    before, after = runs[1][0], runs[1][-1]
    for name in ("held_out", "other", "greedy"):
        for key in ("accuracy", "standard_error", "reward", "pass@1", "response_length"):
            assert f"eval/{name}/{key}" in after, (name, key)
    assert "eval/other/win_rate" not in before
    assert "eval/held_out/win_rate" not in after and "eval/greedy/win_rate" not in after
    assert all(record["eval/other/response_length"] <= 6 for record in runs[1])
    samples = results(root / "run_1" / "evaluation" / "other_00000002.jsonl")
    assert len(samples) == 18 and {s["answer"] for s in samples} == {"7"}
    assert all(s["reward"] == pytest.approx(len(s["response"]) / 100) for s in samples)
    mean = sum(s["reward"] for s in samples) / 18
    assert after["eval/other/reward"] == pytest.approx(mean)
    assert after["eval/other/pass@3"] == pytest.approx(
        sum(any(s["reward"] > 0.045 for s in samples if s["prompt_id"] == p) for p in range(6)) / 6
    )


def test_the_win_rate_is_that_of_all_pairs_of_answers(runs, root):
    directory = root / "run_1" / "evaluation"
    mine, theirs = (results(directory / f"other_0000000{step}.jsonl") for step in (1, 0))
    means = []
    for prompt in range(6):
        own = [s["reward"] for s in mine if s["prompt_id"] == prompt]
        other = [s["reward"] for s in theirs if s["prompt_id"] == prompt]
        meetings = [(a > b) + 0.5 * (a == b) for a in own for b in other]
        means.append(sum(meetings) / len(meetings))
    mean = sum(means) / 6
    error = math.sqrt(sum((m - mean) ** 2 for m in means) / 5 / 6)
    record = runs[1][1]
    assert record["eval/other/win_rate"] == pytest.approx(mean)
    assert record["eval/other/win_rate/standard_error"] == pytest.approx(error)


def test_ranks_agree(runs):
    # answers after an update may differ by rounding, those before it do not
    one, two = runs[1][0], runs[2][0]
    assert {k for k in one if k.startswith("eval/")} == {k for k in two if k.startswith("eval/")}
    for key, value in one.items():
        if key.startswith("eval/"):
            assert two[key] == pytest.approx(value, nan_ok=True), key


def test_tensorboard_has_the_sets_by_name(runs, root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(root / "run_2" / "tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {"eval/held_out/accuracy", "eval/other/win_rate", "eval/greedy/pass@1"} <= set(tags)
    assert [e.step for e in board.Scalars("eval/other/reward")] == [0, 1, 2]


def test_the_mix_gives_each_source_its_share_and_holds_out_of_both(root):
    config = load_config(config_of(root, "mixed"))
    inputs = read_inputs(config)
    held = inputs.held_out["held_out"].texts()
    assert len(held) == 4 and not set(held) & set(inputs.train.texts())
    assert sum(size for size, _ in inputs.shares) == len(inputs.train)
    stream = make_stream(config, inputs)
    drawn = [inputs.train[i] for step in range(6) for i in stream.indices(step)]
    # weights 1 and 0.5: 20 of 30 are of chain_sum, 10 of the file, with its answers
    more = [prompt for prompt in drawn if prompt.text.startswith("How far")]
    assert len(drawn) == 30 and len(more) == 10
    assert {prompt.answer for prompt in more} == {"5"}


def serve(world: World, path: str, cases: list[list[str]]) -> list[Any]:
    found: list[Any] = []
    for words in cases:
        with start_reward_server() as server:
            try:
                found.append(evaluate(load_config(path, words), world, server))
            except ValueError as error:
                found.append(str(error))
    return found


@pytest.mark.full
def test_alone_with_an_opponent_of_another_run(runs, root):
    config = config_of(root, "alone", held_out=0)
    start = root / "run_1" / "evaluation" / "other_00000000.jsonl"
    torn = root / "torn.jsonl"
    torn.write_text(start.read_text().replace("How old", "How young"))
    judged = root / "judged.jsonl"
    judged.write_text(start.read_text().replace(LENGTH, "someone else"))
    key = "evaluation.sets.other"
    cases = [
        [f"{key}.against={start}"],
        [f"{key}.against={torn}"],
        [f"{key}.against={judged}"],
        [f"{key}.against={root / 'none.jsonl'}"],
        [f"{key}.against=start"],  # of a training run
    ]
    good, *bad, alone = run_ranks(serve, 2, str(config), cases, timeout_s=200)[1]
    # the same model and the same random numbers: only ties
    assert good["eval/other/win_rate"] == 0.5
    assert good["eval/other/win_rate/standard_error"] == 0
    assert "eval/held_out/accuracy" not in good and good["eval/greedy/pass@1"] >= 0
    for message, part in zip(bad, ("another prompt", "was judged by", "FileNotFound"), strict=True):
        assert part in message and "against=" in message, message
    assert alone["eval/other/reward"] == good["eval/other/reward"]
    assert "eval/other/win_rate" not in alone
    directory = root / "alone" / "evaluation"
    assert len(results(directory / "other.jsonl")) == 18
    assert read_metrics(directory / "metrics.jsonl")[0]["eval/other/win_rate"] == 0.5
