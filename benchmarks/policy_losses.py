"""GRPO, RLOO, REINFORCE++, GSPO and online DPO on the quickstart's task: held-out accuracy of each.

Each is a run of configs/quickstart.yaml with the overrides below, two optimizer steps per rollout
(so that importance ratios matter), and everything else alike. Results are kept in --out: what is
there is not run again, so the script goes on where it was stopped.

    python benchmarks/policy_losses.py [--out DIR] [--only NAME ...] [key=value ...]

The last line is one JSON object; before it stands a table for benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SET = "eval/held_out"
COMMON = ("train.num_minibatches=2", "checkpoint.export=false", "log.tensorboard=false")
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "GRPO": (),
    "RLOO": ("algorithm.advantage=rloo", "algorithm.loss_mean=fixed_length"),
    "REINFORCE++": ("algorithm.advantage=reinforce_pp",),
    "GSPO": (
        "algorithm.policy_loss=gspo",
        "algorithm.loss_mean=sequence_mean",
        "algorithm.clip_low=3e-4",
        "algorithm.clip_high=4e-4",
    ),
    "online DPO": (
        "flow=online_dpo",
        "roles.reference.ranks=same as policy",
        "preference.pairs=all",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "policy_losses")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(ALGORITHMS), help="default: all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run")
    given = parser.parse_intermixed_args()
    results = {}
    for name in given.only or ALGORITHMS:
        done = given.out / slug(name) / "result.json"
        if not done.is_file():
            run(name, given.out / slug(name), given.ranks, given.overrides)
        results[name] = json.loads(done.read_text(encoding="utf-8"))
    print("| algorithm | accuracy before | after | gain ± error | seconds |\n|---|---|---|---|---|")
    for name, found in results.items():
        print(
            f"| {name} | {100 * found['before']:.1f} % | {100 * found['after']:.1f} % "
            f"| {100 * found['gain']:.1f} ± {100 * found['gain_error']:.1f} "
            f"| {found['seconds']:.0f} |"
        )
    print(json.dumps(results))


def run(name: str, directory: Path, ranks: int, overrides: Sequence[str]) -> None:
    """Train, or go on with it, and write what came of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "spmdrl", "train", "configs/quickstart.yaml"]
    words = [*COMMON, *ALGORITHMS[name], f"run_dir={directory}", "checkpoint.every=5", *overrides]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **os.environ}
    print(f"== {name}: {' '.join(words)}", flush=True)
    subprocess.run([*command, *words], cwd=ROOT, env=environment, check=True)
    result = measured(directory)
    (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")


def measured(directory: Path) -> dict[str, float]:
    """Accuracy before and after, and the error of the difference: the prompts are the same, so it
    is that of their differences. Seconds are those of the steps.
    """
    from spmdrl.observe.metrics import read_metrics

    records = read_metrics(directory / "metrics.jsonl")
    accuracies = [r[f"{SET}/accuracy"] for r in records if f"{SET}/accuracy" in r]
    files = sorted((directory / "evaluation").glob("held_out_*.jsonl"))
    before, after = (right_by_prompt(file) for file in (files[0], files[-1]))
    gains = [after[prompt] - before[prompt] for prompt in before]
    mean = sum(gains) / len(gains)
    spread = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    return {
        "before": accuracies[0],
        "after": accuracies[-1],
        "gain": mean,
        "gain_error": (spread / len(gains)) ** 0.5,
        "steps": max(r["step"] for r in records),
        "seconds": sum(r.get("seconds/step", 0.0) for r in records),
    }


def right_by_prompt(file: Path) -> dict[int, float]:
    """The share of right responses to each prompt."""
    found: dict[int, list[float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record["prompt_id"], []).append(float(record["reward"] >= 1))
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def slug(name: str) -> str:
    return name.lower().replace(" ", "_").replace("+", "p")


if __name__ == "__main__":
    main()
