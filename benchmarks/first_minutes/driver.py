"""Runs the stages, each in a process of its own, and prints one JSON object per line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from first_minutes.stages import STAGES, Stage, install_command, missing_modules, select, within

ROOT = Path(__file__).parents[2]
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-dev.txt")
SLOW = 5
"""A stage that takes so many times its expected seconds is ended; without a budget so do ten
minutes at least."""
PATIENCE_S = 600


@dataclass(kw_only=True)
class Check:
    """One run of the stages: where its lines go, and what later stages are told.

    Args:
        small: tiny shapes, which rehearse everything within minutes on a stand-in device.
        budget: seconds for everything; None: no limit.
        files: streams that get every line.
    """

    small: bool
    budget: float | None
    files: tuple[TextIO, ...]
    began: float = field(default_factory=time.monotonic)
    ceilings: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def say(self, stage: str, /, **fields: Any) -> None:
        """Print a line at once."""
        line = {"stage": stage, "at_s": round(self.elapsed(), 1), **fields}
        for file in self.files:
            print(json.dumps(line), file=file, flush=True)

    def fail(self, stage: str, /, **fields: Any) -> None:
        self.failed.append(stage)
        self.say(stage, **fields)

    def note(self, line: Mapping[str, Any]) -> None:
        """Pass on a line of a stage's process."""
        fields = {name: value for name, value in line.items() if name != "stage"}
        self.say(line["stage"], **fields)
        if "error" in line:
            self.failed.append(line["stage"])
        elif line["stage"] == "ceilings":
            self.ceilings |= line["measured"]

    def limit(self, stage: Stage) -> float:
        """Return the seconds after which a stage's process is ended."""
        if self.budget is None:
            return max(PATIENCE_S, SLOW * stage.seconds)
        return min(SLOW * stage.seconds, self.budget - self.elapsed())


def run_stages(check: Check, stages: Sequence[Stage]) -> int:
    """Run the stages that the budget leaves; returns 1 if any failed, else 0."""
    kept = within(check.budget, stages)
    check.say(
        "plan",
        budget_s=check.budget,
        expected_s={stage.name: stage.seconds for stage in kept},
        dropped=[stage.name for stage in stages[len(kept) :]],
    )
    for number, stage in enumerate(kept):
        missing = missing_modules(stage)
        if missing:
            command = install_command(sys.executable, missing, REQUIREMENTS)
            check.fail(stage.name, error=f"not installed: {', '.join(missing)}", install=command)
            continue
        if check.budget is not None and check.elapsed() + stage.seconds > check.budget:
            dropped = [later.name for later in kept[number:]]
            check.say("plan", dropped=dropped, why="earlier stages took longer than expected")
            break
        run_stage(check, stage)
    failed = list(dict.fromkeys(check.failed))
    check.say("end", failed=failed)
    return int(bool(failed))


def run_stage(check: Check, stage: Stage) -> None:
    """Run one stage's process, pass on its lines, and say how it ended if that was not well."""
    limit, errors = check.limit(stage), check.failed.count(stage.name)
    with start(check, stage) as process:
        timer = threading.Timer(limit, kill, [process])
        timer.start()
        assert process.stdout is not None
        for text in process.stdout:
            check.note(json.loads(text))
        code = process.wait()
        late = not timer.is_alive()
        timer.cancel()
    if late:
        check.fail(stage.name, error=f"ended after {limit:.0f} s")
    elif code and check.failed.count(stage.name) == errors:
        check.fail(stage.name, error=f"its process ended with code {code}")


def start(check: Check, stage: Stage) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", stage.program, stage.name, stage.module]
    words += ["--ceilings", json.dumps(check.ceilings), *(["--small"] if check.small else [])]
    paths = [str(ROOT / "benchmarks"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,  # so that a stage's own processes end with it
    )


def kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # it may have just ended
        os.killpg(process.pid, signal.SIGKILL)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh",
        description="Measure a GPU and this project on it, in stages: "
        + ", ".join(f"{stage.name} ({stage.seconds} s)" for stage in STAGES),
    )
    found.add_argument(
        "--budget", type=float, metavar="SECONDS", help="drop the last stages that do not fit"
    )
    found.add_argument("--small", action="store_true", help="tiny shapes: a rehearsal")
    found.add_argument("--stages", metavar="A,B", help="only these stages")
    found.add_argument("--out", type=Path, metavar="FILE", help="add the lines to this file, too")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(words)
    try:
        stages = select(options.stages)
    except ValueError as error:
        parser().error(str(error))
    if options.out is None:
        return run_stages(
            Check(small=options.small, budget=options.budget, files=(sys.stdout,)), stages
        )
    with options.out.open("a", encoding="utf-8") as file:
        check = Check(small=options.small, budget=options.budget, files=(sys.stdout, file))
        return run_stages(check, stages)
