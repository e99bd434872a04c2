"""Predicted against measured on this machine: seconds by phase, and resident memory.

    python benchmarks/plan_truth.py --model models/SmolLM2-135M-Instruct --data FILE [--steps 7] \
        [--directory DIR] [--cases CASE ...] [--set KEY=VALUE ...]

FILE is JSONL with `question` and `answer`. One run calibrates (`spmdrl plan --calibrate`); three
others are predicted before they start, from their configuration and the calibrated machine: twice
as many prompts, other lengths, two ranks in place of one. Lengths are set by the limit, since the
reward says nothing and sampling seldom ends early; means that a run measured are used for both.
Phases over one second must be within 20 %, the peak of a rank's resident memory within 10 %. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REWARD = Path(__file__).parent / "step_reward.py"
CONFIG = Path(__file__).with_suffix(".yaml")
LEAST_SECONDS, SECONDS_WITHIN, BYTES_WITHIN = 1.0, 0.20, 0.10


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration to predict, as changes of the calibrating one."""

    name: str
    words: Sequence[str]
    ranks: int = 1


CASES = (
    Case(name="twice the prompts", words=("data.prompts_per_step=16",)),
    Case(name="longer responses", words=("sampling.max_tokens=192",)),
    Case(name="two ranks", words=(), ranks=2),
)


def main() -> None:
    options = option_parser().parse_args()
    if options.directory is not None:
        measure(options, Path(options.directory))
        return
    with tempfile.TemporaryDirectory() as directory:
        measure(options, Path(directory))


def option_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--directory", help="keep the runs here")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for all runs")
    return parser


def measure(options: argparse.Namespace, directory: Path) -> None:
    from spmdrl.planning.forecast.calibrate import calibrated
    from spmdrl.planning.forecast.machines import save_machine

    machine_file = directory / "machine.yaml"
    run(options, directory / "calibration", Case(name="calibration", words=()), None)
    save_machine(calibrated(directory / "calibration"), machine_file)
    found = []
    for case in [case for case in CASES if case.name in options.cases]:
        run_dir = directory / case.name.replace(" ", "_")
        run(options, run_dir, case, machine_file)
        found.append(compared(case, run_dir))
    is_met = all(case["is_met"] for case in found)
    print(json.dumps({"is_met": is_met, "cases": found}))


def run(options: argparse.Namespace, run_dir: Path, case: Case, machine: Path | None) -> None:
    """Train in processes of their own, so that each has its own peak."""
    words = [
        f"steps={options.steps}",
        f"run_dir={run_dir}",
        f"model.path={options.model}",
        f"data.train.source={options.data}",
        f"rewards.0.function={REWARD}:spread",
        *([] if machine is None else [f"machine={machine}"]),
        *options.set,
        *case.words,
    ]
    start = [sys.executable, "-m"]
    if case.ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}", "-m"]
    subprocess.run(
        [*start, "spmdrl", "train", str(CONFIG), *words], check=True, env=dict(os.environ)
    )


def compared(case: Case, run_dir: Path) -> dict[str, Any]:
    """Print predicted and measured figures of a run, and return them."""
    from spmdrl.planning.forecast.calibrate import read_run
    from spmdrl.planning.forecast.peaks import peak_bytes

    done = read_run(run_dir)
    predicted, measured = done.predicted(done.machine), done.measured()
    print(f"{case.name}: {len(done.records)} steps")
    phases = {
        phase: ratio_of(phase, predicted.get(phase, 0.0), seconds, "s")
        for phase, seconds in measured.items()
        if seconds >= LEAST_SECONDS
    }
    peak = (done.machine.process_bytes + peak_bytes(done.plan)) / 1e9
    memory = ratio_of("resident peak", peak, done.peak_bytes() / 1e9, "GB")
    is_met = abs(memory - 1) <= BYTES_WITHIN
    is_met &= all(abs(ratio - 1) <= SECONDS_WITHIN for ratio in phases.values())
    return {
        "name": case.name,
        "is_met": is_met,
        "seconds": rounded({phase: measured[phase] for phase in phases}),
        "predicted_over_measured": rounded(phases),
        "peak_gb": round(done.peak_bytes() / 1e9, 3),
        "peak_predicted_over_measured": round(memory, 3),
    }


def ratio_of(name: str, predicted: float, measured: float, unit: str) -> float:
    ratio = predicted / measured
    shown = f"predicted {predicted:7.2f} {unit}, measured {measured:7.2f} {unit}"
    print(f"  {name:<16} {shown}: {ratio:.2f}")
    return ratio


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


if __name__ == "__main__":
    main()
