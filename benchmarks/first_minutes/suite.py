"""Stage `tests`: the project's own tests that need a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

from first_minutes.cases import Case, Outcome, Setting
from first_minutes.stages import STAGES

TESTS = ("tests/gpu", "tests/flows/test_memory.py", "-m", "gpu")
FEW = ("tests/gpu/test_gpu.py", "-m", "gpu", "-k", "noise or two_devices")
"""A rehearsal's: whoever rehearses runs all of them elsewhere."""


def cases(setting: Setting) -> Iterator[Case]:
    yield Case(name="pytest -m gpu", run=lambda: tests(FEW if setting.small else TESTS))


def tests(selection: tuple[str, ...]) -> Outcome:
    """Run pytest. All tests are predicted to pass; skipped ones are listed with their reasons.

    Raises:
        RuntimeError: tests failed; the message names them.
    """
    words = [sys.executable, "-m", "pytest", *selection, "-q", "-rsfE", "-W", "default"]
    # the project's own options would hide the counts
    words += ["-o", "addopts=", "-p", "no:cacheprovider"]
    limit = 5 * next(stage.seconds for stage in STAGES if stage.name == "tests")
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=None, text=True, check=False, timeout=limit
    )
    lines = done.stdout.splitlines()
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        raise RuntimeError("; ".join(bad) or (lines[-1] if lines else "pytest printed nothing"))
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|skipped)", lines[-1])}
    passed, skipped = counts.get("passed", 0), counts.get("skipped", 0)
    return Outcome(
        predicted={"passed": passed, "failed": 0},
        measured={"passed": passed, "failed": 0, "skipped": skipped},
        facts={"skips": [line for line in lines if line.startswith("SKIPPED")]},
    )
