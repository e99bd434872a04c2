"""What a user's flow, environment, trainer or role lacks is said at the start, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow_cases import write_config
from spmdrl.commands.train import checked_flow
from spmdrl.config.load import load_config
from spmdrl.config.sections import Config
from spmdrl.config.user_objects import load_object
from spmdrl.roles.custom import make_user_role
from spmdrl.run.user_parts import check_made

OWN = """
from abc import ABC, abstractmethod

from spmdrl.api import Column, Environment, GroupEnvironment, GrpoTrainer

value = 3

def main(run): ...
def no_run(): ...
def two(run, config): ...
async def waits(run): ...
def yields(run):
    yield run
class Flow:
    def __init__(self, run): ...
    def __call__(self, run): ...
called = Flow(None)

class Inherits(GroupEnvironment):
    def collect(self, step): ...

class NoAhead:
    def __init__(self, run): ...
    def collect(self, step): ...
    def metrics(self): ...

class OfProtocol(Environment):
    def __init__(self, run): ...
    def collect(self, step): ...
    def metrics(self): ...

class NoRun:
    def collect(self, step): ...
    def ahead(self, step): ...
    def metrics(self): ...

class OtherArguments(GroupEnvironment):
    def collect(self, step, batch): ...

class NoFunction(GroupEnvironment):
    metrics = {}

class Waits(GroupEnvironment):
    async def collect(self, step): ...

class Yields(GroupEnvironment):
    def collect(self, step):
        yield step

class Abstract(GroupEnvironment, ABC):
    @abstractmethod
    def reward(self): ...

class Delegates:
    def __init__(self, run):
        self.inner = GroupEnvironment(run)
    def __getattr__(self, name):
        return getattr(self.inner, name)

class Sets:
    def __init__(self, run):
        self.collect = self.ahead = self.metrics = lambda *given: None

class SetsNone:
    def __init__(self, run):
        self.collect = self.ahead = self.metrics = None

def makes(run):
    return NoAhead(run)

class TrainerAlone(GrpoTrainer):
    def step(self, step, batch): ...

class OneCall(GrpoTrainer):
    def step(self, step, batch, ahead): ...

class NoStep:
    def __init__(self, run): ...

class NoHeldOut:
    def __init__(self, run): ...
    def step(self, step, batch): ...

class HeldOut(NoHeldOut):
    def __init__(self, run):
        self.held_out = run

class Judge:
    needs, returns = ("tokens",), (Column(name="scores", kind="row"),)
    def __init__(self, scale=1.0): ...
    def setup(self, context): ...
    def forward_step(self, batch): ...

class NoSetup:
    needs, returns = Judge.needs, Judge.returns
    def forward_step(self, batch): ...

class TextNeeds(Judge):
    needs = "response"

class TextReturns(Judge):
    returns = ("scores",)

class OneReturn(Judge):
    returns = Column(name="scores", kind="row")

class OtherStep(Judge):
    def forward_step(self, tokens, lengths): ...

class OtherTrain(Judge):
    def train_step(self): ...

class Raises(Judge):
    def __init__(self):
        raise KeyError("weights")
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    (file.parent / "broken.py").write_text("def main(run):\n    pass\n1 / 0\n")
    return file


def config_of(file: Path, **sections: Any) -> Config:
    path = write_config(file.parent / "c.yaml", file.parent, file.parent / "run", **sections)
    return load_config(path)


FLOWS = {
    "no_run": r"takes \(\), but is called with \(run\)",
    "two": r"takes \(run, config\), but is called with \(run\): missing a required argument",
    "waits": "is `async`, and nobody awaits it: write `def`",
    "yields": "has a `yield`",
    "Flow": "is a class: name a function of one argument, the run",
    "value": "is a int: name a function of one argument",
    "mian": "has no 'mian'; did you mean 'main'",
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows(file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=FLOWS[name]) as refused:
        checked_flow(config_of(file, flow=f"{file}:{name}"))
    assert str(refused.value).startswith(f"flow={file}:{name}") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["main", "called"])
def test_flows_that_serve(file: Path, name: str) -> None:
    assert checked_flow(config_of(file, flow=f"{file}:{name}")) is load_object(f"{file}:{name}")


ENVIRONMENTS = {
    "NoAhead": r"the class NoAhead has no 'ahead': add ahead\(step\)",
    "OfProtocol": r"the class OfProtocol has no 'ahead': add ahead\(step\)",
    "NoRun": r"is made with the run, and takes \(\), but is called with \(run\)",
    "OtherArguments": r"'collect' takes \(self, step, batch\), but is called with \(self, step\)",
    "NoFunction": r"has 'metrics', but it is no function: make it metrics\(\)",
    "Waits": "its 'collect' is `async`",
    "Yields": "its 'collect' has a `yield`",
    "Abstract": "is abstract: add reward",
    "value": "is a int: name a class that is made with the run",
    "Nothing": "has no 'Nothing'; it has",
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=ENVIRONMENTS[name]) as refused:
        checked_flow(config_of(file, environment=f"{file}:{name}"))
    assert str(refused.value).startswith(f"environment={file}:{name}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["Inherits", "Delegates", "Sets", "makes"])
def test_environments_that_may_serve(file: Path, name: str) -> None:
    checked_flow(config_of(file, environment=f"{file}:{name}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sets", None),
        ("SetsNone", "the class SetsNone has 'collect', but it is no function"),
        ("makes", "the class NoAhead has no 'ahead'"),
    ],
)
def test_what_only_an_object_shows_is_seen_when_it_is_made(
    file: Path, name: str, message: str | None
) -> None:
    where = f"{file}:{name}"
    config = config_of(file, environment=where)
    made = load_object(where)(None)
    if message is None:
        check_made(config, where, made)
        return
    with pytest.raises(ValueError, match=f"^environment={where}: {message}"):
        check_made(config, where, made)


def test_a_flow_of_ones_own_asks_for_what_it_wants(file: Path) -> None:
    given = {"environment": f"{file}:NoAhead", "trainer": f"{file}:NoStep"}
    checked_flow(config_of(file, flow=f"{file}:main", **given))


LAG = {"lag": 1, "algorithm": {"importance_cap": 2.0}}


def test_trainers(file: Path) -> None:
    with pytest.raises(ValueError, match=r"^trainer=.*NoStep has no 'step': add step"):
        checked_flow(config_of(file, trainer=f"{file}:NoStep"))
    alone = f"{file}:TrainerAlone"
    checked_flow(config_of(file, trainer=alone))  # with no calls alongside
    with pytest.raises(ValueError, match=r"is called with \(self, step, batch, call\)"):
        checked_flow(config_of(file, trainer=alone, **LAG))
    with pytest.raises(ValueError, match=r"is called with \(self, step, batch\)"):
        checked_flow(config_of(file, trainer=f"{file}:OneCall", **LAG))


def test_trainers_of_pairs_evaluate_them(file: Path) -> None:
    for name in ("NoHeldOut", "HeldOut"):
        where = f"{file}:{name}"
        config = Config.model_construct(flow="dpo", environment=None, trainer=where, lag=0)
        if name == "NoHeldOut":
            with pytest.raises(ValueError, match=f"^trainer={where}: .*has no 'held_out', which"):
                checked_flow(config)
            continue
        checked_flow(config)
        with pytest.raises(ValueError, match=r"its 'held_out' has no 'evaluate': add evaluate\("):
            check_made(config, where, load_object(where)(None))


ROLES = {
    "NoSetup": "the class NoSetup has no 'setup'; a role has needs, returns, setup",
    "TextNeeds": "the class TextNeeds has needs='response': make it a tuple of columns' names",
    "TextReturns": r"has returns=\('scores',\): make it a tuple of Column",
    "OneReturn": r"has returns=Column\(.*: make it a tuple of Column",
    "OtherStep": r"'forward_step' takes \(tokens, lengths\), but is called with \(batch\)",
    "OtherTrain": r"'train_step' takes \(\), but is called with \(batch\)",
    "value": "is a int: name a class",
    "Raises": "cannot be made: KeyError: 'weights'",
    "Nothing": "has no 'Nothing'; it has",
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=ROLES[name]) as refused:
        make_user_role("judge", f"{file}:{name}", {})
    told = str(refused.value)
    assert told.startswith("roles.judge") and f"{file}" in told.partition("\n")[0]
    assert "\n" not in told or name == "Raises"


def test_options_of_roles(file: Path) -> None:
    make_user_role("judge", f"{file}:Judge", {"scale": 2.0})
    with pytest.raises(ValueError, match=r"roles.judge.options={'sclae': 2.0}: got an unexpected"):
        make_user_role("judge", f"{file}:Judge", {"sclae": 2.0})


def test_a_file_that_raises_is_named_with_the_line(file: Path) -> None:
    where = f"{file.with_name('broken.py')}:main"
    with pytest.raises(ValueError, match="cannot be imported: ZeroDivisionError") as refused:
        checked_flow(config_of(file, flow=where))
    first, place, *code = str(refused.value).splitlines()
    assert first.startswith(f"flow={where}: ") and place.endswith("line 3, in <module>")
    assert len(code) <= 2 and not any("File" in line for line in code)
