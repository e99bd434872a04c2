"""The reward `code`: forms of tests, what counts as passing, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spmdrl.rewards import code as code_module
from spmdrl.rewards.code import code_of
from spmdrl.rewards.functions import RewardSpec, load
from spmdrl.sandbox.run import unusable

needs_sandbox = pytest.mark.skipif(unusable() is not None, reason=f"no sandbox: {unusable()}")

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


def score(response: str, tests: Any, *, row: dict[str, Any] | None = None, **options: Any) -> float:
    function = load(RewardSpec(name="x", function="code", options=options))
    value = function("", response, None, {"tests": tests, **(row or {})})
    assert isinstance(value, float)
    return value


STACK = """
class Stack:
    def __init__(self):
        self.items = []
    def push(self, item):
        self.items.append(item)
        return self
    def __len__(self):
        return len(self.items)
    def __iter__(self):
        return iter(self.items)
"""

CASES = {
    "asserts": (ADD, "assert add(1, 2) == 3\nassert add([1], [2]) == [1, 2]", {}, 1.0),
    "a wrong program": (ADD.replace("+", "-"), "assert add(1, 2) == 3", {}, 0.0),
    "a list": (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], {}, 0.0),
    "HumanEval": (
        ADD,
        "def check(candidate):\n    for n in range(3):\n        assert candidate(n, 1) == n + 1",
        {"row": {"entry_point": "add"}},
        1.0,
    ),
    "test functions": (
        ADD,
        "from solution import add\ndef test_one(): assert add(1, 1) == 2\n"
        "def test_two():\n    try: add(1, 'x')\n    except TypeError: return\n    assert False",
        {},
        1.0,
    ),
    "unittest": (
        ADD,
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_it(self): self.assertEqual(add(2, 2), 5)",
        {},
        0.0,
    ),
    "calls": (
        ADD,
        json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}),
        {},
        1.0,
    ),
    "a method": (
        "class Solution:\n    def double(self, xs):\n        return tuple(x * 2 for x in xs)",
        {"fn_name": "double", "inputs": [[[1, 2]]], "outputs": [[2, 4]]},
        {},
        1.0,
    ),
    "a program": (
        "n = int(input())\nprint(n * 2, '')\nprint()",
        {"inputs": ["2\n", "40"], "outputs": ["4", "80\n"]},
        {},
        1.0,
    ),
    "a prefix": (
        "    return a + b",
        "assert add(1, 2) == 3",
        {"row": {"head": "def add(a, b):\n"}, "prefix": "head"},
        1.0,
    ),
    "objects": (
        STACK,
        "s = Stack()\ns.push(3).push('x')\nassert len(s) == 2 and s.items == [3, 'x']\n"
        "assert list(s) == [3, 'x'] and s != [3, 'x']",
        {},
        1.0,
    ),
    "values": (
        "def same(*x): return list(x)",
        "v = [None, True, -5, 10**30, 1.5, float('inf'), 2j, 'ä', b'x', (1,), {2}, {3: [4]}]\n"
        "assert same(*v) == v and [type(x) for x in same(*v)] == [type(x) for x in v]",
        {},
        1.0,
    ),
    "an error of its own": (
        "class Own(Exception): pass\ndef f(): raise Own('why')",
        "try: f()\nexcept Exception as error: assert str(error) == 'Own: why'\nelse: assert 0",
        {},
        1.0,
    ),
    "no program": ("I cannot do that.", "assert add(1, 2) == 3", {}, 0.0),
}


@needs_sandbox
@pytest.mark.parametrize("case", CASES)
def test_a_program_is_judged_by_its_rows_tests(case: str) -> None:
    response, tests, options, wanted = CASES[case]
    assert score(response, tests, **options) == wanted


@needs_sandbox
def test_the_share_of_tests_that_pass() -> None:
    texts = [f"assert add(1, 2) == {n}" for n in (3, 3, 3, 4)]
    assert score(ADD, texts, score="share") == 0.75
    printed = {"inputs": ["1", "2"], "outputs": ["1", "5"]}
    assert score("print(input())", printed, score="share") == 0.5


@needs_sandbox
def test_tests_without_a_form_are_a_failed_call() -> None:
    for tests in ("", [], {"inputs": []}, 3, [3]):
        with pytest.raises(ValueError, match="neither Python code"):
            score(ADD, tests)
    function = load(RewardSpec(name="x", function="code", options={"tests": "checks"}))
    with pytest.raises(ValueError, match="no column 'checks'"):
        function("", ADD, None, {"tests": ""})


def test_a_host_without_namespaces_is_refused_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_module, "unusable", lambda: "unshare: not permitted")
    with pytest.raises(ValueError, match=r"\(unshare: not permitted\): .*sandbox: none"):
        load(RewardSpec(name="x", function="code"))
    assert score(ADD, "assert add(1, 2) == 3", sandbox="none") == 1.0
    assert score("import os\nos._exit(0)", "assert add(1, 2) == 3", sandbox="none") == 0.0


def test_a_program_that_stops_its_starter_is_ended_too() -> None:
    """Without a sandbox it may signal the process that waits for it."""
    stops = "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nwhile True: pass"
    options = {"sandbox": "none", "timeout_s": 1.0}
    assert score(stops, "assert add(1, 2) == 3", **options) == 0.0


def test_the_last_fenced_block_is_the_program() -> None:
    assert code_of(ADD) == "def add(a, b):\n    return a + b\n"
    assert code_of("```\nx\n```\n```py\ny\n```") == "y\n"
    assert code_of("x = 1") == "x = 1"
