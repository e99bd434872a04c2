"""This project and TRL, or `transformers.generate`, on the same work, in turn.

    python benchmarks/peers.py --work grpo|lora|dpo|rollout --model DIR [--data FILE] [--runs 2]

Both sides run in turn, each time in a fresh process with all cores (OMP_NUM_THREADS, if it is set).

- grpo: 8 questions x 4 samples of 96 tokens (most are cut there), no KL, one update. TRL computes
  the samples of one question at once.
- lora: the same with an adapter of rank 16 on all matrices, which TRL has from PEFT.
- dpo: 16 pairs with the reference computed in every step; TRL computes 4 pairs at once.
- rollout: 32 prompts of 96 tokens, responses until their end or 256 tokens. transformers draws in
  one batch, and each of its responses is made to end where ours did.

Questions are sums and pairs are made up where --data gives none (JSONL with `question`, or with
`prompt`, `chosen` and `rejected`). Steps are medians of --steps after one that is not measured,
peaks are resident sets. Sides that did different work are refused: rows, updates and dtype are to
be equal, tokens to differ by 5 % at most. The last line is one JSON object of medians; `ratio` is
theirs to ours of seconds, and ours to theirs of tokens per second for rollouts (`ours_seconds` and
`theirs_seconds` are then those of the whole call).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORKS = ("grpo", "lora", "dpo", "rollout")
SIDES = ("ours", "theirs")
LORA = (16, 32)
"""Rank and alpha."""
PAIRS_AT_ONCE = 4
TOLERANCE = 0.05
"""Largest difference of tokens, of ours."""

Figures = Mapping[str, Any]


def main() -> None:
    options = parse()
    if options.side is not None:
        figures = own(options) if options.side == "ours" else theirs(options)
        print(json.dumps(figures))
        return
    found: dict[str, list[Figures]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if options.data is None and options.work != "rollout":
            options.data = str(write_rows(place / "rows.jsonl", options))
        for run in range(options.runs):
            for side in SIDES:
                work = place / f"{side}_{run}"
                work.mkdir()
                lengths = place / f"ours_{run}" / "lengths.json"
                found[side].append(run_side(side, options, work, lengths))
                print(side, json.dumps(found[side][-1]), flush=True)
    print(json.dumps(summary(options.work, found["ours"], found["theirs"])))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=WORKS, required=True)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--data")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="measured, after one warm-up")
    parser.add_argument("--prompts", type=int, help="questions, pairs or prompts")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, help="of a response")
    for name in ("side", "run-dir", "lengths"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.prompts = options.prompts or {"dpo": 16, "rollout": 32}.get(options.work, 8)
    options.max_tokens = options.max_tokens or {"rollout": 256}.get(options.work, 96)
    return options


def write_rows(path: Path, options: argparse.Namespace) -> Path:
    """Write the rows of one step, so that every step of both sides has these."""
    rows: list[dict[str, str]] = []
    for i in range(options.prompts):
        question = f"What is {17 * i + 5} + {7 * i + 3}? Explain each of your steps in detail."
        if options.work == "dpo":
            right, wrong = 24 * i + 8, 23 * i + 11
            why = " ".join(f"Step {k} adds {k + i} to what step {k - 1} gave." for k in range(1, 9))
            rows.append(
                {
                    "prompt": f"{question} Then say in a few words how you know that it is right.",
                    "chosen": f"{why} The sum is {right}, and taking one away again shows it.",
                    "rejected": f"It is {wrong}. {why[: 90 + 11 * i]}",
                }
            )
        else:
            rows.append({"question": question, "answer": f"#### {24 * i + 8}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_side(side: str, options: argparse.Namespace, run_dir: Path, lengths: Path) -> Figures:
    """Run one side in a process of its own, and return what its last line says."""
    words = [str(HERE / "peers.py"), "--side", side, "--run-dir", str(run_dir)]
    words += ["--lengths", str(lengths)]
    for name in ("work", "model", "data", "steps", "prompts", "group_size", "max_tokens"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), **os.environ}
    done = subprocess.run(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def own(options: argparse.Namespace) -> Figures:
    if options.work == "rollout":
        return rollout(options, "native", ["--lengths", "natural", "--write", options.lengths])
    import own_steps

    words = [
        f"model.path={options.model}",
        "model.dtype=float32",
        f"data.train.source={options.data}",
        f"data.prompts_per_step={options.prompts}",
        f"steps={options.steps + 1}",
    ]
    if options.work == "dpo":
        words += ["flow=dpo", "roles={policy: {}, reference: {}}", "data.train.answer_pattern=null"]
        words += ["data.group_size=1", "preference={beta: 0.1, reference: step}"]
        words += ["data.train.prompt_column=prompt"]
        words += ["data.train.columns={chosen: chosen, rejected: rejected}"]
    else:
        words += [f"data.group_size={options.group_size}", "data.train.max_tokens=384"]
        words += [f"sampling.max_tokens={options.max_tokens}"]
        words += [f"rewards=[{{function: '{own_steps.REWARD}'}}]"]
    if options.work == "lora":
        rank, alpha = LORA
        words += [f"roles={{policy: {{adapter: {{rank: {rank}, alpha: {alpha}}}}}, rollout: {{}}}}"]
    figures, _ = own_steps.timed(words, Path(options.run_dir))
    return figures


def theirs(options: argparse.Namespace) -> Figures:
    if options.work == "rollout":
        return rollout(options, "hf", ["--lengths", options.lengths])
    import trl_steps

    step = trl_steps.Step(
        model=options.model,
        data=Path(options.data),
        prompts=options.prompts,
        group_size=options.group_size,
        max_tokens=options.max_tokens,
        steps=options.steps,
        directory=Path(options.run_dir),
        lora=LORA if options.work == "lora" else None,
    )
    return trl_steps.dpo(step, PAIRS_AT_ONCE) if options.work == "dpo" else trl_steps.grpo(step)


def rollout(options: argparse.Namespace, engine: str, words: Sequence[str]) -> Figures:
    """Run rollout.py, and return its figures under the names of steps."""
    command = [sys.executable, str(HERE / "rollout.py"), "--engine", engine, *words]
    command += ["--model", options.model, "--num-prompts", str(options.prompts)]
    command += ["--max-tokens", str(options.max_tokens)]
    if options.data is not None:
        command += ["--data", options.data]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": told["seconds"],
        "tokens": told["tokens"],
        "gb": told["peak_rss_gb"],
        "rows": told["num_prompts"],
        "updates": 0,
        "dtype": told["dtype"],
    }


def summary(work: str, ours: Sequence[Figures], theirs: Sequence[Figures]) -> dict[str, Any]:
    """Medians under the names of the last line.

    Raises:
        SystemExit: the sides did different work.
    """
    check(ours, theirs)

    def median(side: Sequence[Figures], figure: str) -> float:
        return statistics.median(one[figure] for one in side)

    def cost(side: Sequence[Figures]) -> float:
        if work == "rollout":
            return statistics.median(one["seconds"] / one["tokens"] for one in side)
        return median(side, "seconds")

    return {
        "work": work,
        "ours_seconds": round(median(ours, "seconds"), 2),
        "theirs_seconds": round(median(theirs, "seconds"), 2),
        "ratio": round(cost(theirs) / cost(ours), 2),
        "ours_gb": round(median(ours, "gb"), 2),
        "theirs_gb": round(median(theirs, "gb"), 2),
    }


def check(ours: Sequence[Figures], theirs: Sequence[Figures]) -> None:
    """Refuse sides that did different work."""
    for name in ("rows", "updates", "dtype"):
        told = {str(one[name]).removesuffix(".0") for one in (*ours, *theirs)}
        if len(told) > 1:
            raise SystemExit(f"peers.py: the sides differ in {name}: {', '.join(sorted(told))}")
    for own_side, other in zip(ours, theirs, strict=True):
        if abs(own_side["tokens"] - other["tokens"]) > TOLERANCE * own_side["tokens"]:
            raise SystemExit(
                f"peers.py: tokens of a step differ by more than {TOLERANCE:.0%}: ours "
                f"{own_side['tokens']:.0f}, theirs {other['tokens']:.0f}"
            )


if __name__ == "__main__":
    main()
