"""Reward functions are tried before there is a model: what ends the start, what does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spmdrl.data.prompts import Prompt
from spmdrl.rewards.functions import RewardSpec
from spmdrl.rewards.judging import RewardJob
from spmdrl.rewards.pool import RewardPool
from spmdrl.rewards.server import RewardServer, start_reward_server
from spmdrl.rewards.trial import Trial, try_out

USER = '''
import itertools, os, time

_calls = itertools.count(1)

def by_name(response, answer, **kwargs):
    return float(answer in response)

def columns(response, tests):
    return float(tests[0] in response)

def none(response):
    pass

def listed(response):
    return [1.0]

def worded(response):
    return "good"

def no_score(response):
    return {"length": 1.0}

def nothing_for_long(response):
    return 1.0 if len(response) < 9 else None

def inner(response):
    return {}["no such key"]

def raises(response):
    try:
        return inner(response)
    except KeyError as error:
        raise RuntimeError("a judge is down") from error

def tags(response):
    return float(response.split("<answer>")[1].split("</answer>")[0].strip() == "5")

def boxed(response):
    return float(response.split("boxed{")[1].split("}")[0] == "5")

def short_alone(response):
    if len(response) > 9:
        raise ValueError("too long")
    return 1.0

def hangs(response):
    time.sleep(60)

def dies(response):
    os._exit(3)

def endless(response):
    return float("nan")

def calls(response):
    return float(next(_calls))

def misled(response):
    return 1.0

class Misled:
    """Says that it takes what it does not."""
    __signature__ = __import__("inspect").signature(misled)
    def __call__(self, text):
        return 1.0

misled = Misled()
'''

PROMPT = Prompt(
    prompt_id=0, text="2 + 3?", messages=(), tokens=(), answer="5", entry={"tests": ["5"]}
)


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with start_reward_server() as server:
        yield server


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("user") / "mine.py"
    file.write_text(USER)
    return str(file)


def tried(server: RewardServer, function: str, prompt: Prompt = PROMPT, **settings: Any) -> Trial:
    specs = [RewardSpec(name="mine", function=function)]
    settings = {"columns": ("tests",), "timeout_s": 0.5, **settings}
    with RewardPool(server, specs, **settings) as pool:
        return try_out(pool, specs, prompt, "data.train")


@pytest.mark.parametrize("name", ["by_name", "columns", "tags", "boxed", "short_alone"])
def test_a_function_that_works_for_one_of_two_texts_serves(
    server: RewardServer, user: str, name: str
) -> None:
    trial = tried(server, f"{user}:{name}")
    assert trial.problem is None
    assert len(trial.notes) == (name in ("tags", "boxed", "short_alone"))


BAD = {
    "none": "it returned a NoneType: None .*return a number, or a dict of numbers with 'score'",
    "listed": r"it returned a list: \[1.0\]",
    "worded": "it returned a str: 'good'",
    "no_score": "must hold 'score'",
    "nothing_for_long": "it returned a NoneType",
    "misled": r"TypeError: .*unexpected keyword argument 'response'",
    "raises": "fails for the first prompt of data.train.*RuntimeError: a judge is down",
    "hangs": r"no reply in 0.5 s \(make it faster, or raise reward_pool.timeout_s\)",
    "dies": "the worker ended with exit code 3",
    "endless": "returned.*nan",
}


@pytest.mark.parametrize("name", BAD)
def test_what_ends_the_start(server: RewardServer, user: str, name: str) -> None:
    problem = tried(server, f"{user}:{name}").problem
    assert problem is not None and problem.startswith(f"reward 'mine' ({user}:{name})")
    with pytest.raises(ValueError, match=BAD[name]):
        raise ValueError(problem)
    assert "\n" not in problem or name == "raises"


def test_an_error_has_the_frames_of_the_user_alone_and_stands_once(
    server: RewardServer, user: str
) -> None:
    problem = tried(server, f"{user}:raises").problem
    assert problem is not None
    first, *frames = problem.splitlines()
    assert first.endswith("RuntimeError: a judge is down")
    assert problem.count("a judge is down") == 2  # and in the line of its frame
    assert [line for line in frames if line.startswith("from ")] == ["from KeyError: 'no such key'"]
    places = [line for line in frames if line.startswith("  File ")]
    assert len(places) == 3 and all(f'"{user}"' in place for place in places)


def test_built_in_rewards_are_tried_too(server: RewardServer) -> None:
    assert tried(server, "number") == Trial(problem=None)
    empty = Prompt(prompt_id=0, text="?", messages=(), tokens=(), answer=None, entry={})
    problem = tried(server, "exact", empty).problem
    assert problem is not None and "\n" not in problem
    assert problem.endswith("the row has no answer to compare with (data.answer_column)")


def test_nothing_of_the_trial_is_left(server: RewardServer, user: str) -> None:
    specs = [RewardSpec(name="mine", function=f"{user}:calls")]
    with RewardPool(server, specs) as pool:
        assert try_out(pool, specs, PROMPT, "data.train").problem is None
        jobs = [RewardJob(prompt="", response="", answer=None)]
        assert [r.score for r in pool.score(jobs)] == [1.0]


def test_a_signature_is_refused_before_anything_is_called(
    server: RewardServer, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def f(completions, **kwargs): return [0.0] * len(completions)\n")
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"mine.py:f\): it takes \(completions.*\(tests\)"
    ) as refused:
        tried(server, f"{file}:f")
    assert "\n" not in str(refused.value) and time.monotonic() - began < 5.0


def test_how_functions_are_called_is_told(server: RewardServer, user: str) -> None:
    specs = [
        RewardSpec(name="mine", function=f"{user}:columns"),
        RewardSpec(name="exact", function="exact"),
    ]
    with RewardPool(server, specs, columns=("tests",)) as pool:
        (called,) = pool.callers.values()
        assert called.how == "by name: response, tests" and called.columns == ("tests",)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import no_such_neighbour\n", 3),
        ("def g(): 1 / 0\ng()\n", 6),
        ("def f(:\n", 1),
    ],
)
def test_a_file_that_cannot_be_imported_says_where_in_it(
    server: RewardServer, tmp_path: Path, source: str, lines: int
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(ValueError, match="cannot be imported: ") as refused:
        tried(server, f"{file}:f")
    told = str(refused.value).splitlines()
    assert len(told) <= lines and all("spmdrl/" not in line for line in told[1:])
