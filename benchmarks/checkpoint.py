"""What an asynchronous checkpoint at every step costs the GRPO step of `grpo_step.py`.

    python benchmarks/checkpoint.py --model DIR --data FILE [--ranks 2] [--steps 3] [--rounds 2]

Runs with and without checkpoints take turns, in the same processes; which of them goes first
alternates, as later runs find warmer memory. A step is compared with the same step of the other run
(equal samples, equal tokens), and the mean over all of them is given with its error. The time of a
step is from its line in metrics.jsonl to the next one, so that everything between two steps counts;
each run's first is left out. The copies to the host in that time are taken off: they are the price
of going on while the copy is written. The last line is one JSON object.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import grpo_step


class Copies(logging.Handler):
    """What the log says of checkpoints: seconds of the copy, bytes, seconds until it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[float, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "spmdrl.checkpoint.writing" and isinstance(record.args, tuple):
            _, copy_s, gigabytes, whole_s = record.args
            self.found.append((float(copy_s), float(gigabytes), float(whole_s)))

    def take(self) -> list[tuple[float, float, float]]:
        """Those since the last call."""
        found, self.found = self.found, []
        return found


def main() -> None:
    parser = grpo_step.option_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    options = parser.parse_args()
    if options.ranks > 1 and "RANK" not in os.environ:
        grpo_step.start_ranks(options.ranks)
    from spmdrl.rewards.server import start_reward_server

    with tempfile.TemporaryDirectory() as directory, start_reward_server() as server:
        from spmdrl.commands.train import train
        from spmdrl.distributed.reduce import broadcast_object
        from spmdrl.observe.log import set_up_logging
        from spmdrl.world import start_world, stop_world

        world = start_world(device="auto")
        copies = Copies()
        set_up_logging(world.rank).addHandler(copies)
        # all ranks write into rank 0's directory
        root = Path(broadcast_object(directory, 0))
        seconds: dict[int, list[float]] = {0: [], 1: []}
        written: list[tuple[float, float, float]] = []
        for number in range(options.rounds):
            for every in (0, 1) if number % 2 == 0 else (1, 0):
                run_dir = root / f"run_{number}_{every}"
                config = grpo_step.config_of(options, str(run_dir), [f"checkpoint.every={every}"])
                train(config, world, server)
                found = copies.take()
                if world.is_first:
                    seconds[every] += step_seconds(run_dir)
                    # the last one of a run begins after its last step
                    written += found[: options.steps] if every else []
        stop_world()
        if not world.is_first:
            return
    report(options.ranks, seconds, written)


def step_seconds(run_dir: Path) -> list[float]:
    """Of all steps but the first, everything between them included."""
    from spmdrl.observe.metrics import read_metrics

    lines = [r for r in read_metrics(run_dir / "metrics.jsonl") if "reward" in r]
    return [b["wall_time"] - a["wall_time"] for a, b in pairwise(lines)]


def report(
    ranks: int, seconds: dict[int, list[float]], written: list[tuple[float, float, float]]
) -> None:
    copied = [copy for copy, _, _ in written]
    costs = [
        (beside - copy - alone) / alone
        for alone, beside, copy in zip(seconds[0], seconds[1], copied, strict=True)
    ]
    error = statistics.stdev(costs) / len(costs) ** 0.5 if len(costs) > 1 else None
    print(
        json.dumps(
            {
                "seconds_without": [round(value, 2) for value in seconds[0]],
                "seconds_with": [round(value, 2) for value in seconds[1]],
                "copy_seconds": [round(value, 2) for value in copied],
                "overhead_beyond_copy": round(statistics.mean(costs), 4),
                "error": None if error is None else round(error, 4),
                "checkpoint_gb": round(written[-1][1], 3),
                "seconds_until_there": round(statistics.mean(whole for *_, whole in written), 2),
                "steps_measured": len(costs),
                "ranks": ranks,
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
