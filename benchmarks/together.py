"""Side by side: a reference and a reward model on ranks of their own, called together and in turn.

    python benchmarks/together.py [--model DIR] [--rows 4] [--tokens 256] [--rounds 5]

Starts two ranks of one thread each. Both roles run the same forward pass over the same rows, so
that `together` should take as long as one of them, and one call after the other twice as long. The
last line is one JSON object: medians in seconds, and ratios to the mean of the two single calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spmdrl.batch import Batch, from_rows
from spmdrl.config.sections import Config
from spmdrl.distributed.reduce import world_max
from spmdrl.roles.handles import Reference, Reward, together
from spmdrl.run.assembly.assembly import assemble, open_models
from spmdrl.world import World, start_world, stop_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if "RANK" in os.environ:
        world = start_world()
        result = measure(world, given)
        if world.is_first:
            print(json.dumps(result), flush=True)
        stop_world()
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(Path(__file__).resolve()), *sys.argv[1:]]
    sys.exit(subprocess.run([*launch, *script], env=environment, check=False).returncode)


def measure(world: World, given: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "flow": "ppo",
            "steps": 1,
            "run_dir": "unused",
            "model": {"path": given.model},
            "roles": {
                "reference": {"ranks": "0"},
                "reward": {"ranks": "1", "head": "normal"},
            },
            "data": {"prompts_per_step": 1, "train": {"source": "unused"}},
        }
    )
    models = open_models(config)
    roles = assemble(config, world, models, None).roles
    reference, reward = roles["reference"], roles["reward"]
    assert isinstance(reference, Reference) and isinstance(reward, Reward)
    batch = rows(world, given.rows, given.tokens)
    calls: dict[str, Callable[[], object]] = {
        "reference": lambda: reference.logprobs(batch),
        "reward": lambda: reward.score(batch),
        "in_turn": lambda: (reference.logprobs(batch), reward.score(batch)),
        "together": lambda: together(reference.logprobs.on(batch), reward.score.on(batch)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(given.rounds + 1):
        for name, call in calls.items():
            world_max(torch.zeros(1))  # all ranks begin at once
            began = time.perf_counter()
            call()
            took = world_max(torch.tensor([time.perf_counter() - began])).item()
            if turn:  # the first round warms up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    one = (medians["reference"] + medians["reward"]) / 2
    return {
        **{f"{name}_s": round(value, 3) for name, value in medians.items()},
        "together_ratio": round(medians["together"] / one, 3),
        "in_turn_ratio": round(medians["in_turn"] / one, 3),
    }


def rows(world: World, count: int, tokens: int) -> Batch:
    """Home rows: `count` in all, half of each a prompt, of random tokens."""
    generator = torch.Generator().manual_seed(world.rank)
    own = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)
    batch = from_rows(
        [torch.randint(1000, (tokens,), generator=generator).tolist() for _ in own],
        rows={
            "prompt_ids": torch.tensor(list(own), dtype=torch.int64),
            "sample_index": torch.zeros(len(own), dtype=torch.int64),
            # one token is read as well by the reward as by the reference: equal work
            "prompt_lengths": torch.full((len(own),), tokens - 1),
        },
    )
    mask = (torch.arange(batch.num_tokens) + 1) % tokens == 0
    return batch.with_columns(tokens={"loss_mask": mask})


if __name__ == "__main__":
    main()
