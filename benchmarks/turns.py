"""Tokens per second of samples that take turns, with environments that sleep and without.

    python benchmarks/turns.py --model DIR --samples 96 --running 48 --turns 4 --max-tokens 48 \
        --seconds 2 --workers 48

Every sample has --turns turns of exactly --max-tokens tokens, drawn at temperature 1, and its
environment answers each with a short message, after a real sleep of 0 to --seconds seconds (drawn
for each row and turn) or at once. The two are run in turn, --repeats times each. Loading and a
short warm-up are not timed. The last line is one JSON object; `share` is the tokens per second with
sleeps over those without (medians).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spmdrl.api import Observation


class Sleeping:
    """An environment: asks for a story, and answers each turn after a sleep."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.number, self.turn = 0, 0

    def start(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
        self.number = row["number"]
        return [{"role": "user", "content": f"Write story number {self.number} about a river."}]

    def step(self, response: str) -> Observation:
        draw = random.Random(f"{self.number} {self.turn}")
        self.turn += 1
        time.sleep(draw.uniform(0, self.seconds))
        content = f"That was part {self.turn} of {len(response)} letters. What happens next?"
        return Observation(messages=[{"role": "user", "content": content}], reward=1.0)


class Ends:
    """The renderer of a chat template, for `EnvironmentTurns`."""

    def __init__(self, renderer: Any) -> None:
        self.observation, self.text = renderer.observation, renderer.text
        self._ids = renderer.end_ids

    def ends(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] in self._ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--running", type=int, default=48, help="samples computed at a time")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48, help="of a turn")
    parser.add_argument("--seconds", type=float, default=2.0, help="longest sleep")
    parser.add_argument("--workers", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()

    from spmdrl.rewards.server import start_reward_server

    with start_reward_server() as server:  # before torch
        rates = measured(args, server)
    instant, sleeping = (statistics.median(found) for found in rates)
    print(
        json.dumps(
            {
                "share": round(sleeping / instant, 3),
                "tokens_per_s_instant": [round(rate, 1) for rate in rates[0]],
                "tokens_per_s_sleeping": [round(rate, 1) for rate in rates[1]],
                **vars(args),
                "threads": int(os.environ["OMP_NUM_THREADS"]),
            }
        )
    )


def measured(args: argparse.Namespace, server: Any) -> tuple[list[float], list[float]]:
    """Tokens per second of each run, without sleeps and with them."""
    import torch

    from spmdrl.models.files.tokenizers import load_tokenizer
    from spmdrl.turns.rendering import TurnRenderer

    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    renderer = TurnRenderer(load_tokenizer(args.model), datetime.now(UTC))
    engine = engine_of(args)
    rates: tuple[list[float], list[float]] = ([], [])
    run(args, server, engine, renderer, 0.0, samples=4)
    for _ in range(args.repeats):
        for found, seconds in zip(rates, (0.0, args.seconds), strict=True):
            found.append(run(args, server, engine, renderer, seconds, samples=args.samples))
            print(f"sleeps up to {seconds:g} s: {found[-1]:.1f} tokens/s", flush=True)
    return rates


def engine_of(args: argparse.Namespace) -> Any:
    from spmdrl.models.files.hf import fill, open_model
    from spmdrl.rollout.native.engine import NativeEngine
    from spmdrl.rollout.native.workspace import NativeOptions

    config, checkpoint = open_model(args.model)
    engine = NativeEngine(config, options=NativeOptions(max_running=args.running))
    table = engine.weights.table()
    fill(((engine.allocate(name), held.slices) for name, held in table.items()), checkpoint)
    return engine


def run(
    args: argparse.Namespace,
    server: Any,
    engine: Any,
    renderer: Any,
    seconds: float,
    *,
    samples: int,
) -> float:
    """Tokens per second that are drawn in one call."""
    from spmdrl.rollout.protocol import Ending, Request, SamplingParams
    from spmdrl.turns.call import EnvironmentTurns
    from spmdrl.turns.settings import TurnsSettings

    settings = TurnsSettings(
        kind=f"{Path(__file__).resolve()}:Sleeping",
        options={"seconds": seconds},
        max_turns=args.turns,
        workers=args.workers,
    )
    sampling = SamplingParams(temperature=1.0, max_tokens=args.max_tokens, ignore_eos=True)
    with EnvironmentTurns(server, Ends(renderer), settings) as source:
        openings = source.openings([{"number": i} for i in range(samples)])
        requests = [
            Request(
                tokens=tuple(renderer.opening(opening.messages, opening.tools)),
                prompt_id=i,
                samples=(0,),
                sampling=sampling,
                room=args.turns * (args.max_tokens + 64),
            )
            for i, opening in enumerate(openings)
        ]
        with source.open(requests, [opening.entry for opening in openings]) as turns:
            start = time.perf_counter()
            found = engine.generate(requests, seed=0, step=0, turns=turns)
            elapsed = time.perf_counter() - start
    drawn = 0
    for [completion] in found:
        assert completion.ending is Ending.TURNS, completion.ending
        drawn += len(completion.tokens) - sum(last - first for first, last in completion.given)
    assert drawn == samples * args.turns * args.max_tokens, drawn
    return drawn / elapsed


if __name__ == "__main__":
    main()
