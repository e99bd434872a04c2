"""The reward `code`: whether the response's program passes the row's tests, in a sandbox.

The response runs in one process, the tests in another; both are confined (`spmdrl.sandbox`). The
tests call the response's functions and get plain values back, so that the verdict is made outside
of the process that ran the response.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from spmdrl.sandbox.run import MAX_OUTPUT, Confined, Isolation, Limits, memory_file, unusable

_FENCE = re.compile(
    r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of a program's tests.

    Args:
        failure: text of the first failure, or None.
    """

    passed: int
    total: int
    failure: str | None = None

    @property
    def share(self) -> float:
        return self.passed / self.total if self.total else 0.0


def code_of(response: str) -> str:
    """Return the last fenced block of Python in a response, or all of it if it has none."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else response


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Judge of programs.

    Args:
        timeout_s: seconds that all tests of one program may take.
        module: name under which tests may import the program.
    """

    limits: Limits
    isolation: Isolation
    timeout_s: float
    module: str = "solution"

    def of_tests(self, code: str, tests: Sequence[str], entry_point: str | None) -> Verdict:
        """Judge by texts of Python code: asserts, `check(candidate)`, `test_*`, unittest cases."""
        asked = {"tests": list(tests), "entry_point": entry_point, "module": self.module}
        return self._judged(code, asked)

    def of_calls(
        self, code: str, function: str, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> Verdict:
        """Judge by calls of a function, each with a list of arguments and the wanted result."""
        calls = {"function": function, "inputs": list(inputs), "outputs": list(outputs)}
        return self._judged(code, {"calls": calls, "module": self.module})

    def of_programs(self, code: str, inputs: Sequence[str], outputs: Sequence[str]) -> Verdict:
        """Judge by what the program prints for each text on standard input; spaces at ends of lines
        and empty lines at the end do not count.
        """
        deadline, passed, failure = time.monotonic() + self.timeout_s, 0, None
        for text, wanted in zip(inputs, outputs, strict=True):
            found, problem = self._printed(code, text, deadline)
            if problem is None and _lines(found) == _lines(wanted):
                passed += 1
            else:
                failure = failure or problem or f"it printed {found[:200]!r}"
        return Verdict(passed=passed, total=len(inputs), failure=failure)

    def _judged(self, code: str, asked: Mapping[str, Any]) -> Verdict:
        deadline = time.monotonic() + self.timeout_s
        said = memory_file()
        ours, theirs = socket.socketpair()
        answering = (str(theirs.fileno()), self.module)
        judging = (str(ours.fileno()), str(said))
        try:
            with (
                self._start("answering:serve", answering, code, theirs.fileno()),
                self._start(
                    "testing:judge", judging, json.dumps(asked), ours.fileno(), said
                ) as tests,
            ):
                ours.close()
                theirs.close()
                if tests.wait(deadline) is None:
                    late = f"it took more than {self.timeout_s:g} s"
                    return Verdict(passed=0, total=1, failure=late)
            verdict = os.pread(said, MAX_OUTPUT, 0)
        finally:
            os.close(said)
            ours.close()
            theirs.close()
        if not verdict:
            return Verdict(passed=0, total=1, failure="the tests ended without a verdict")
        return Verdict(**json.loads(verdict))

    def _printed(self, code: str, text: str, deadline: float) -> tuple[str, str | None]:
        """Return what a program prints for an input, and what went wrong, if anything did."""
        source = memory_file(code)
        try:
            with self._start("answering:program", (str(source),), text, source) as program:
                ended = program.wait(deadline)
                found = program.output()
        finally:
            os.close(source)
        if ended is None:
            return found, f"it took more than {self.timeout_s:g} s"
        return found, f"it ended with exit code {ended}" if ended else None

    def _start(
        self, program: str, arguments: Sequence[str], given: str, *descriptors: int
    ) -> Confined:
        return Confined(
            program,
            arguments,
            given=given,
            limits=self.limits,
            isolation=self.isolation,
            descriptors=descriptors,
        )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def code(
    *,
    tests: str = "tests",
    entry_point: str = "entry_point",
    prefix: str | None = None,
    score: str = "all",
    timeout_s: float = 6.0,
    memory_mb: int = 1024,
    sandbox: str = "auto",
) -> Any:
    """Score the program in a response by the row's tests, which it never sees.

    Args:
        tests: the column with the tests: Python code (asserts, `check(candidate)` as HumanEval has
            it, functions `test_*`, unittest cases), a list of such texts, each counted on its own
            (MBPP), or `{"inputs": [...], "outputs": [...]}` of texts on standard input and output,
            or of arguments and results with `"fn_name"` (APPS).
        entry_point: the column with the name of the function that `check` gets.
        prefix: a column whose text comes before the response's code, as a signature.
        score: `all`: 1 if all tests pass; `share`: the share that passes.
        timeout_s: seconds for one response; below `reward_pool.timeout_s`.
        memory_mb: MiB of each process.
        sandbox: `auto` refuses where programs cannot be confined; `none` runs them with limits
            only.
    """
    if score not in ("all", "share"):
        raise ValueError(f"score={score!r}: it must be all or share")
    if sandbox not in ("auto", "none"):
        raise ValueError(f"sandbox={sandbox!r}: it must be auto or none")
    reason = unusable() if sandbox == "auto" else None
    if reason is not None:
        raise ValueError(
            f"programs cannot be confined on this host ({reason}): `spmdrl doctor` says more; "
            "sandbox: none runs them with your rights, which is for programs that you trust"
        )
    judge = Judge(
        limits=Limits(memory_mb=memory_mb, cpu_s=max(1, round(timeout_s))),
        isolation="namespaces" if sandbox == "auto" else "none",
        timeout_s=timeout_s,
    )

    def scored(prompt: str, response: str, answer: str | None, entry: Mapping[str, Any]) -> float:
        if tests not in entry:
            raise ValueError(f"the row has no column {tests!r} with tests: it has {sorted(entry)}")
        before = "" if prefix is None else f"{entry[prefix]}"
        verdict = verdict_of(
            judge, before + code_of(response), entry[tests], entry.get(entry_point)
        )
        return verdict.share if score == "share" else float(verdict.share == 1.0)

    return scored


def verdict_of(judge: Judge, code: str, tests: Any, entry_point: str | None) -> Verdict:
    """Judge a program by tests in any of the forms that `code` accepts.

    Raises:
        ValueError: the tests have none of them.
    """
    if isinstance(tests, str) and tests.lstrip().startswith("{"):
        with suppress(json.JSONDecodeError):
            tests = json.loads(tests)
    if isinstance(tests, str) and tests.strip():
        return judge.of_tests(code, [tests], entry_point)
    if isinstance(tests, Mapping) and tests.get("inputs") and "outputs" in tests:
        if tests.get("fn_name"):
            return judge.of_calls(code, tests["fn_name"], tests["inputs"], tests["outputs"])
        return judge.of_programs(code, tests["inputs"], tests["outputs"])
    if isinstance(tests, Sequence) and tests and all(isinstance(t, str) for t in tests):
        return judge.of_tests(code, list(tests), entry_point)
    raise ValueError(
        "the row's tests are neither Python code, nor a list of such texts, nor "
        "{'inputs': [...], 'outputs': [...]}"
    )
