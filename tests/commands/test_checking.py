"""Whether a run would start on a user's own file, found out before anything trains."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flow_cases import questions, write_config
from spmdrl.commands.check import check
from spmdrl.commands.cli import main
from spmdrl.config.load import load_config
from spmdrl.observe.log import RankHandler
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "rlhf": ("sft", "reward_model", "ppo"),
    "dpo": ("judge", "dpo"),
    "online_dpo": ("judge", "online_dpo"),
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


Shape = Callable[[str, str, str], dict[str, Any]]
SHAPES: dict[str, Shape] = {
    "texts": lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r},
    "whole conversations": lambda p, c, r: {
        "chosen": [user(p), assistant(c)],
        "rejected": [user(p), assistant(r)],
    },
    "a prompt beside whole conversations": lambda p, c, r: {
        "prompt": p,
        "chosen": [user(p), assistant(c)],
        "rejected": [user(p), assistant(r)],
    },
    "answers as conversations": lambda p, c, r: {
        "prompt": [user(p)],
        "chosen": [assistant(c)],
        "rejected": [assistant(r)],
    },
    "a prompt as a conversation": lambda p, c, r: {
        "prompt": [{"role": "system", "content": "Be brief."}, user(p)],
        "chosen": c,
        "rejected": r,
    },
    "several turns": lambda p, c, r: {
        "chosen": [user(p), assistant("Go on."), user("So?"), assistant(c)],
        "rejected": [user(p), assistant("Go on."), user("So?"), assistant(r)],
    },
}


def write_pairs(path: Path, count: int, shape: str = "texts", letters: int = 40) -> Path:
    """Pairs whose answers have about so many letters, some of them many more."""
    draw = random.Random(count)

    def text(word: str) -> str:
        size = letters * draw.choice((1, 1, 2, 3)) * (20 if draw.random() < 0.02 else 1)
        return (f"{word} " * size)[:size]

    rows = [SHAPES[shape](f"{i} {text('why')}", text("yes"), text("no")) for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checking")
    make_tiny_model(root / "model", max_position_embeddings=4096)
    return root / "model"


@pytest.fixture(scope="module")
def fit() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fit", ROOT / "scripts/examples/fit.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["fit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fit"]


Fitted = Callable[..., tuple[int, dict[str, list[str]], str]]


@pytest.fixture
def fitted(
    model: Path,
    fit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Fitted]:
    """Run the script on a file: its exit code, the keys of each stage, and its messages."""

    def run(
        example: str, data: Path, *words: str, directory: Path = model
    ) -> tuple[int, dict[str, list[str]], str]:
        monkeypatch.setenv("DATA", str(data))
        monkeypatch.setenv("ANSWER_COLUMN", os.environ.get("CHOSEN_COLUMN", "chosen"))
        command = ["fit.py", example, "--model", str(directory), "--ranks", "2", *words]
        monkeypatch.setattr(sys, "argv", command)
        status = fit.main()
        out, err = capsys.readouterr()
        stages = {name: keys for name, *keys in map(str.split, out.splitlines())}
        return status, stages, err

    yield run
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, RankHandler)]:
        root.removeHandler(handler)


def items(keys: list[str]) -> int:
    """The stage's items in a step; the shipped stages have 16."""
    return next((int(key.split("=")[1]) for key in keys if "per_step" in key), 16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [30, 114])
def test_the_examples_take_small_files_of_any_shape(tmp_path, fitted, count, shape):
    data = write_pairs(tmp_path / "pairs.jsonl", count, shape)
    for example, stages in EXAMPLES.items():
        status, found, said = fitted(example, data)
        assert status == 0 and tuple(found) == stages, said
        assert all(2 <= items(keys) <= 16 for keys in found.values())
        for line in (line for line in said.splitlines() if "rows are used" in line):
            assert f"of {count} rows are used" in line
        assert said.count("rows are used") == {"rlhf": 3, "dpo": 4, "online_dpo": 4}[example]


def test_the_examples_take_long_rows_a_few_at_a_time(tmp_path, fitted):
    """Most rows would be left out by a limit made for short ones."""
    data = write_pairs(tmp_path / "pairs.jsonl", 114, letters=200)
    status, found, said = fitted("rlhf", data)
    assert status == 0, said
    assert {name: items(keys) < 16 for name, keys in found.items()} == {
        "sft": True,
        "reward_model": True,
        "ppo": True,
    }
    used = next(line for line in said.splitlines() if "rows are used" in line)
    assert int(used.split("): ")[1].split()[0]) > 100, used
    # what the user says holds
    status, found, said = fitted("rlhf", data, "data.prompts_per_step=5", "steps=3")
    assert status == 0 and found["ppo"] == [] and "data.prompts_per_step=5, steps=3" in said


@pytest.mark.full
def test_fewer_long_rows_are_evaluated(tmp_path, fitted, fit):
    """The tiny model has a token for each letter or two: a pair of these has more than 500."""
    data = write_pairs(tmp_path / "pairs.jsonl", 700, letters=200)
    keys = fitted("rlhf", data)[1]["reward_model"]
    most = [int(key.split("=")[1]) for key in keys if key.startswith("evaluation.max_items=")]
    assert len(most) == 1 and fit.FEWEST_EVALUATED <= most[0] < 64
    data = write_pairs(tmp_path / "short.jsonl", 700)
    assert not [key for key in fitted("rlhf", data)[1]["reward_model"] if "max_items" in key]


def test_rows_are_no_longer_than_the_model_s_context(tmp_path, fitted):
    """Lengths include the samples: 48, 64, and 192 tokens for held-out prompts."""
    make_tiny_model(tmp_path / "model", max_position_embeddings=500)
    data = write_pairs(tmp_path / "pairs.jsonl", 60)
    found = {name: fitted(name, data, directory=tmp_path / "model")[1] for name in EXAMPLES}
    limits = {
        stage: [word for word in keys if "max_tokens" in word]
        for stages in found.values()
        for stage, keys in stages.items()
    }
    own = "evaluation.sets.answers.data.max_tokens=308"
    assert limits == {
        "sft": ["data.train.max_tokens=500"],
        "reward_model": ["data.train.max_tokens=500"],
        "judge": ["data.train.max_tokens=500"],
        "ppo": ["data.train.max_tokens=452"],
        "dpo": ["data.train.max_tokens=500", "evaluation.sets.pairs.data.max_tokens=500", own],
        "online_dpo": [
            *("data.train.max_tokens=436", own),
            "evaluation.sets.pairs.data.max_tokens=500",
        ],
    }


@pytest.mark.full
@pytest.mark.parametrize("count", [1000, 20_000])
@pytest.mark.parametrize("letters", [40, 200])
def test_the_examples_take_large_files(tmp_path, fitted, count, letters):
    data = write_pairs(tmp_path / "pairs.jsonl", count, letters=letters)
    for example, stages in EXAMPLES.items():
        status, found, said = fitted(example, data)
        assert status == 0 and tuple(found) == stages, said
        assert f"of {min(count, 3000)} rows are used" in said


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"question": "a", "chosen": "b", "rejected": "c"}] * 9, [], "no column 'prompt'"),
        ([{"prompt": "a", "better": "b", "worse": "c"}] * 9, [], "no column 'chosen'"),
        (
            [{"prompt": f"{i}", "chosen": "b", "rejected": "b"} for i in range(9)],
            [],
            "9 with equal",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9, [], "evaluation.held_out=10%"),
        ([], [], "leaves no example of 0 rows"),
        ([1, 2], [], "2 malformed"),
        (None, ["steps=some"], "steps='some'"),
        (None, ["train.lrr=1"], "unknown key 'train.lrr'"),
    ],
)
def test_what_a_file_lacks_is_one_line(tmp_path, fitted, rows, words, message):
    data = tmp_path / "pairs.jsonl"
    if rows is None:
        write_pairs(data, 60)
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, said = fitted("rlhf", data, *words)
    last = said.splitlines()[-1]
    assert status == 2 and last.startswith("rlhf.sh: stage ") and message in last, said


def test_columns_may_have_other_names(tmp_path, fitted, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    names = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    text = (tmp_path / "pairs.jsonl").read_text()
    for name, other in names.items():
        text = text.replace(f'"{name}"', f'"{other}"')
        monkeypatch.setenv(f"{name.upper()}_COLUMN", other)
    (tmp_path / "pairs.jsonl").write_text(text)
    for example, stages in EXAMPLES.items():
        status, found, said = fitted(example, tmp_path / "pairs.jsonl")
        assert status == 0 and tuple(found) == stages, said


def test_a_configuration_is_checked_without_a_run(tmp_path, model):
    data = {"prompts_per_step": 5, "group_size": 4, **questions(tmp_path / "q.jsonl", 20)}
    path = write_config(tmp_path / "c.yaml", model, tmp_path / "run", data=data)
    words = ["evaluation.held_out=25%"]
    checked = check(load_config(path, words), 2)
    assert "15 prompts of " in checked.describe() and "5 in held_out" in checked.describe()
    lengths = [len(prompt.tokens) for prompt in checked.inputs.train]
    assert checked.mean_tokens == pytest.approx(sum(lengths) / 15)
    assert not (tmp_path / "run").exists()
    for more, message in (
        (
            ["evaluation.held_out=80%"],
            r"has 4 prompts as well as 16 that are held out \(evaluation",
        ),
        (["roles.policy.tp=3"], r"roles\.policy"),
        (["model.path=nowhere"], r"nowhere"),
        (["sampling.max_tokens=5000"], r"4096 positions"),
        (["flow=nowhere.py:f"], r"nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            check(load_config(path, [*words, *more]), 2)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, model):
    data = {"prompts_per_step": 5, "group_size": 4, **questions(tmp_path / "q.jsonl", 20)}
    path = write_config(tmp_path / "c.yaml", model, tmp_path / "run", data=data)
    command = [sys.executable, "-m", "spmdrl", "check", str(path), "--ranks", "2", "--data"]
    command.append("data.prompts_per_step=30")
    bad = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert bad.returncode == 2 and not bad.stdout
    last = bad.stderr.splitlines()[-1]
    assert last.startswith("spmdrl check: error: data.prompts_per_step=30, but data.train has 20")


@pytest.fixture
def checked(tmp_path, model, capsys) -> Iterator[Callable[..., tuple[int, list[Any], str]]]:
    """Run `spmdrl check --json`: its exit code, its lines, and its messages."""
    data = {"prompts_per_step": 5, "group_size": 4, **questions(tmp_path / "q.jsonl", 20)}
    path = write_config(tmp_path / "c.yaml", model, tmp_path / "run", data=data)

    def run(*words: str) -> tuple[int, list[Any], str]:
        try:
            code = main(["check", str(path), "--json", *words])
        except SystemExit as end:
            code = int(str(end.code))
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    yield run
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, RankHandler)]:
        root.removeHandler(handler)


def test_faults_are_records(checked):
    assert checked() == (0, [], "")
    code, lines, _ = checked("train.lrr=1", "train.lr=.nan", "sampling.stop=END")
    assert code == 2 and all(list(line) == ["key", "value", "message", "fix"] for line in lines)
    assert [(line["key"], line["value"]) for line in lines] == [
        ("train.lr", None),  # JSON has no NaN
        ("train.lrr", 1),
        ("sampling.stop", "END"),
    ]
    # what needs models, roles or a user's file is found as well, each by itself
    code, lines, _ = checked("roles.policy.tp=3", "flow=nowhere.py:f")
    assert code == 2 and [line["key"] for line in lines] == ["flow", "roles.policy.tp"]
    assert lines[1]["value"] == 3
    code, lines, _ = checked("--ranks", "4", "--ranks-per-node", "3")
    assert code == 2 and "--ranks 4 with --ranks-per-node 3" in lines[0]["message"]
    # plan refuses the same
    assert checked("--ranks", "4", "--ranks-per-node", "2", "roles.policy.ranks=nodes 0-1")[0] == 0
    assert checked("model.path=nowhere")[1][0]["message"].count("nowhere")


def test_data_are_read_where_that_is_asked_for(checked, tmp_path):
    few = "data.prompts_per_step=30"
    assert checked(few)[:2] == (0, []), "the data are not read"
    code, lines, _ = checked(few, "--data", "roles.policy.tp=3")
    faults = [line for line in lines if "fix" in line]
    assert code == 2 and [fault["key"] for fault in faults] == [
        "roles.policy.tp",
        few.split("=")[0],
    ]
    (tmp_path / "more.jsonl").write_text('{"question": "a?", "answer": "5"}\n{"answer": "3"}\n' * 3)
    more = f"{{source: {tmp_path}/more.jsonl, on_bad_row: skip, unique: true}}"
    code, lines, _ = checked(
        "--data", "evaluation.held_out=25%", f"evaluation.sets.x={{data: {more}}}"
    )
    assert code == 0
    train, other, data, held_out, own = lines
    assert (train["key"], train["rows"], train["used"], train["left_out"]) == (
        *("data.train", 20, 20),
        {},
    )
    assert other["key"] == "evaluation.sets.x.data" and (other["rows"], other["used"]) == (6, 1)
    assert sorted(other["left_out"].values()) == [2, 3] and other["longest_tokens"] > 3
    assert (data["key"], data["items"]) == ("data", 15) and data["mean_tokens"] > 3
    assert held_out == {"key": "evaluation.sets.held_out", "items": 5}
    assert own == {"key": "evaluation.sets.x", "items": 1}


def test_without_json_the_command_speaks_to_people(checked, tmp_path, capsys):
    path = str(tmp_path / "c.yaml")
    assert main(["check", path]) == 0
    assert "nothing is refused; --data reads" in capsys.readouterr().out
    assert main(["check", path, "--data"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("20 prompts of ") and "20 of 20 rows are used" in err
    assert main(["check", path, "roles.policy.tp=3", "flow=nowhere.py:f"]) == 2
    out, err = capsys.readouterr()
    assert not out and "error: flow=nowhere.py:f: " in err and "\nroles.policy.tp=3 make 3" in err


@pytest.mark.full
def test_a_limit_is_named_where_an_import_meets_it(model: Path) -> None:
    """An error while a flow is imported is told as the flow's, although its fix is elsewhere."""
    flow = model.parent / "limited.py"
    flow.write_text("raise OSError(24, 'Too many open files')\n", encoding="utf-8")
    path = write_config(model.parent / "limited.yaml", model, model.parent / "limited")
    command = [sys.executable, "-m", "spmdrl", "train", str(path), f"flow={flow}:grpo"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    [line] = [line for line in ended.stderr.splitlines() if ": error: " in line]
    assert ended.returncode == 2 and f"flow={flow}:grpo" in line, ended.stderr
    assert "Too many open files" in line and "raise ulimit -n, which is " in ended.stderr
