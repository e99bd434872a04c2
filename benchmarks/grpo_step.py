"""Seconds of one whole GRPO step, by phase, on real questions.

    python benchmarks/grpo_step.py --model DIR --num-prompts 8 --group-size 4 --max-tokens 128 \
        --data FILE [--ranks 2] [--steps 2]

FILE is JSONL with `question` and `answer` (GSM8K's `#### number` is understood). The first step is
a warm-up; the figures are the medians of the others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

PHASES = ("rollout", "reward", "logprobs", "update")
REWARD = f"'{Path(__file__).parent / 'step_reward.py'}:spread'"


def main() -> None:
    options = option_parser(__doc__).parse_args()
    if options.ranks > 1 and "RANK" not in os.environ:
        start_ranks(options.ranks)
    from spmdrl.rewards.server import start_reward_server

    with tempfile.TemporaryDirectory() as directory, start_reward_server() as server:
        from spmdrl.commands.train import train
        from spmdrl.observe.metrics import read_metrics
        from spmdrl.world import start_world, stop_world

        run_dir = directory if options.ranks == 1 else options.run_dir
        config = config_of(options, run_dir)
        world = start_world(device=config.device)
        train(config, world, server)
        stop_world()
        if os.environ.get("RANK", "0") != "0":
            return
        records = [r for r in read_metrics(Path(run_dir) / "metrics.jsonl") if "reward" in r]
    measured = records[1:]
    seconds = {p: statistics.median(r.get(f"seconds/{p}", 0.0) for r in measured) for p in PHASES}
    total = statistics.median(r["seconds/step"] for r in measured)
    samples = options.num_prompts * options.group_size
    for name, value in seconds.items():
        print(f"{name:<10} {value:7.2f} s")
    print(
        json.dumps(
            {
                "samples_per_s": round(samples / total, 4),
                "seconds": round(total, 2),
                "phases": {name: round(value, 2) for name, value in seconds.items()},
                "rollout_tokens": statistics.median(r["rollout_tokens"] for r in measured),
                "peak_rss_gb": round(max(r["memory/peak_gb"] for r in records), 2),
                "ranks": options.ranks,
                "steps_measured": len(measured),
            }
        )
    )


def start_ranks(count: int) -> NoReturn:
    """This program anew, on `count` ranks of torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    os.execv(sys.executable, [sys.executable, *launch, *sys.argv])


def option_parser(text: str | None) -> argparse.ArgumentParser:
    """The words that say what a step is."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="measured, after one warm-up")
    parser.add_argument("--run-dir", default="runs/benchmark_grpo_step")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def config_of(options: argparse.Namespace, run_dir: str, words: Sequence[str] = ()) -> Any:
    """The configuration of a step; `words` override what the options say."""
    from spmdrl.config.load import load_config

    given = [
        f"model.path={options.model}",
        f"data.train.source={options.data}",
        f"data.prompts_per_step={options.num_prompts}",
        f"data.group_size={options.group_size}",
        f"sampling.max_tokens={options.max_tokens}",
        f"steps={options.steps + 1}",
        f"run_dir={run_dir}",
        # math is scored and timed; the other keeps a group of all wrong answers from skipping
        f"rewards=[{{function: math}}, {{function: {REWARD}}}]",
        *options.overrides,
        *words,
    ]
    return load_config(Path(__file__).parent / "grpo_step.yaml", given)


if __name__ == "__main__":
    main()
