"""Kill a random rank at a random moment, again and again, and see that nothing is lost.

    python tests/kills.py --kills 30 [--seed 0] [--ranks 3]

A run saves after every step. Two of five kills hit it while a checkpoint is being written, as many
anywhere between two steps, the others while it starts. Every time the job must end within a minute
and name the rank; the next start must go on from the last complete checkpoint, and all metrics must
be those of a run that nobody disturbed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from flow_cases import write_config
from saved_runs import CLOCKS
from spmdrl.observe.metrics import read_metrics
from tiny_model import make_tiny_model
from torchrun import Torchrun, wait_until

STEPS = 60
LIMIT_S = 60.0


def records(run_dir: Path) -> dict[int, dict[str, float]]:
    """The lines of the steps, without what clocks and allocators say."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return {}
    return {
        int(line["step"]): {k: v for k, v in line.items() if not k.startswith(CLOCKS)}
        for line in read_metrics(file)
    }


@dataclass
class Loop:
    """The kills so far."""

    root: Path
    ranks: int
    draw: random.Random
    expected: dict[int, dict[str, float]] = field(default_factory=dict)
    runs: int = 0
    kills: int = 0
    resumed: int = 0
    named: int = 0
    saving: int = 0
    began: float = 0.0
    slowest: float = 0.0

    def start(self, run_dir: Path, number: int) -> Torchrun:
        self.began = time.time()
        return Torchrun(
            self.root / "config.yaml",
            f"run_dir={run_dir}",
            ranks=self.ranks,
            log=self.root / f"{run_dir.name}_{number}.log",
        )

    def reference(self) -> None:
        with self.start(self.root / "whole", 0) as run:
            assert run.wait(600) == 0, run.output()
        self.expected = records(self.root / "whole")
        assert len(self.expected) == STEPS

    def one_run(self, wanted: int) -> None:
        """A run from its first step to its last, killed on the way until there are `wanted`."""
        self.runs += 1
        run_dir = self.root / f"run_{self.runs}"
        latest: str | None = None
        killed = False
        for number in range(1000):
            with self.start(run_dir, number) as run:
                if self.kills < wanted and self.draw.random() < 0.95:
                    self.kill(run, run_dir)
                else:
                    assert run.wait(600) == 0, run.output()
                if killed:
                    self.resumed += self.went_on(run, run_dir, latest)
                if run.process.returncode == 0:
                    break
            killed = True
            pointer = run_dir / "checkpoints" / "latest"
            latest = pointer.read_text() if pointer.is_file() else None
        assert records(run_dir) == self.expected, f"{run_dir} differs from the whole run"

    def kill(self, run: Torchrun, run_dir: Path) -> None:
        rank = self.draw.randrange(self.ranks)
        when = self.draw.choice(["start", "step", "step", "save", "save"])
        pause = self.draw.random() ** 2 * {"start": 8.0, "step": 5.0, "save": 0.05}[when]
        wait_until(lambda: len(run.rank_pids()) == self.ranks or run.process.poll() is not None, 60)
        pids = run.rank_pids()
        if when != "start":
            begins = self.is_saving if when == "save" else self.has_stepped
            wait_until(lambda: begins(run_dir) or run.process.poll() is not None, 120)
        time.sleep(pause)
        if run.process.poll() is not None:
            assert run.process.returncode == 0, run.output()
            return  # it was done before
        was_saving = self.is_saving(run_dir)
        os.kill(pids[rank], signal.SIGKILL)
        began = time.monotonic()
        try:
            code = run.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end in {LIMIT_S} s\n{run.output()}") from None
        seconds = time.monotonic() - began
        self.kills, self.slowest = self.kills + 1, max(self.slowest, seconds)
        self.saving += was_saving
        cause = re.search(r"Root Cause.*?rank      : (\d+)", run.output(), re.S)
        is_named = cause is not None and int(cause[1]) == rank and code != 0
        self.named += is_named
        print(
            f"kill {self.kills}: rank {rank} {'while saving' if was_saving else f'in a {when}'}, "
            f"ended after {seconds:.1f} s, {'named' if is_named else 'NOT NAMED'}",
            flush=True,
        )

    def is_saving(self, run_dir: Path) -> bool:
        return self.is_new(run_dir / "checkpoints", ".partial-*/*")

    def has_stepped(self, run_dir: Path) -> bool:
        return self.is_new(run_dir, "metrics.jsonl")

    def is_new(self, directory: Path, pattern: str) -> bool:
        """Whether a file is of this start, and not left by one that was killed."""
        for path in directory.glob(pattern):
            try:
                if path.stat().st_mtime > self.began:
                    return True
            except FileNotFoundError:
                continue
        return False

    def went_on(self, run: Torchrun, run_dir: Path, latest: str | None) -> bool:
        """Whether a start after a kill went on from the last complete checkpoint, exactly."""
        output = run.output()
        found = re.search(r"continuing after step (\d+) of .*/(step_\d+)", output)
        begun = [number for number in records(run_dir) if number in self.expected]
        if latest is None:
            exact = found is None
        else:
            # a kill may have come before it was told
            exact = found is None or found[2] == latest
        same = all(records(run_dir)[number] == self.expected[number] for number in begun)
        if not (exact and same):
            print(f"{run.log} did not go on from {latest}\n{output[-3000:]}", flush=True)
        return exact and same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--ranks", type=int, default=3)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_tiny_model(root / "model", hidden_size=128, intermediate_size=384, num_hidden_layers=4)
        write_config(
            root / "config.yaml",
            root / "model",
            root / "unused",
            steps=STEPS,
            checkpoint={"every": 1, "export": False},
            data={"prompts_per_step": 3, "group_size": 2},
            evaluation={"before": False, "after": False},
        )
        loop = Loop(root=root, ranks=options.ranks, draw=random.Random(options.seed))
        loop.reference()
        while loop.kills < options.kills:
            loop.one_run(options.kills)
    result = {
        "kills": loop.kills,
        "resumed_exactly": loop.resumed,
        "named": loop.named,
        "while_saving": loop.saving,
        "slowest_end_s": round(loop.slowest, 1),
        "seed": options.seed,
    }
    print(json.dumps(result))
    sys.exit(0 if loop.kills == loop.resumed == loop.named else 1)


if __name__ == "__main__":
    main()
