"""Milliseconds of host work per decode step of the native engine, before and now.

    python benchmarks/engine_host.py --runs 5

The model is null: its layers return a constant, and the vocabulary is small, so that nothing is
left but what the host does for a step: the plan, the tensors of indices, the calls of operators,
the draws and what becomes of them. Both sides run in turn, each in a process of its own with one
thread: the loop of --before, of which a `git worktree` is made for as long as this takes, and the
present one. A step's time is the difference of two calls of other lengths, in CPU seconds of the
process, so that neither prompts nor other processes count. Medians of the runs; the last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

BEFORE = "7142bdb"
"""The commit from which the loop was rewritten to keep its rows in tensors."""

SIZES = (1, 64, 256)
PROMPT, SHORT, LONG = 48, 8, 136
"""Tokens of a prompt, and new tokens of the two calls."""

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of each side")
    parser.add_argument("--before", default=BEFORE, help="commit whose loop is measured too")
    parser.add_argument("--here", action="store_true", help="measure this process's own `spmdrl`")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure()))
        return
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "before"
        git("worktree", "add", "--quiet", "--detach", str(tree), args.before)
        try:
            runs = [(side(tree), side(ROOT)) for _ in range(args.runs)]
        finally:
            git("worktree", "remove", "--force", str(tree))
    found: dict[str, Any] = {}
    for size in SIZES:
        for name, place in ((f"ms_per_step_{size}_before", 0), (f"ms_per_step_{size}", 1)):
            found[name] = round(statistics.median(run[place][str(size)] for run in runs), 4)
    tokens = {json.dumps(side["tokens"]) for run in runs for side in run}
    if len(tokens) != 1:
        raise SystemExit("the two loops have drawn other tokens")
    print(json.dumps(found | {"before": args.before, "runs": args.runs}))


def git(*words: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *words], check=True)


def side(tree: Path) -> dict[str, Any]:
    """Measure a tree's engine in a process of its own."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--here"],
        env={**os.environ, **threads, "PYTHONPATH": str(tree / "src")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    print(tree.name, {size: round(found[str(size)], 3) for size in SIZES}, flush=True)
    return found


def measure() -> dict[str, Any]:
    """Return milliseconds of a decode step by the number of sequences, and a digest of the tokens
    that were drawn.
    """
    import torch

    torch.set_num_threads(1)
    engine = null_engine()
    found: dict[str, Any] = {"tokens": []}
    for size in SIZES:
        call(engine, size, SHORT)
        seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
        for _ in range(4):
            for new, taken in seconds.items():
                start = time.process_time()
                done = call(engine, size, new)
                taken.append(time.process_time() - start)
        found[str(size)] = 1000 * (min(seconds[LONG]) - min(seconds[SHORT])) / (LONG - SHORT)
        drawn = [[c.tokens, c.logprobs] for group in done for c in group]
        found["tokens"].append(blake2b(json.dumps(drawn).encode(), digest_size=8).hexdigest())
    return found


def call(engine: Any, size: int, new: int) -> Any:
    from spmdrl.rollout.protocol import Request, SamplingParams

    sampling = SamplingParams(max_tokens=new, ignore_eos=True)
    asked = [
        Request(
            # other lengths, so that the samples reach the ends of pages in other steps
            tokens=tuple(2 + (i + j) % 60 for j in range(PROMPT + i % 16)),
            prompt_id=i,
            samples=(0,),
            sampling=sampling,
        )
        for i in range(size)
    ]
    return engine.generate(asked, seed=0, step=0)


def null_engine() -> Any:
    """Make an engine whose layers return zeros."""
    import torch

    from spmdrl.models.config import read_config
    from spmdrl.models.decoder import Decoder
    from spmdrl.rollout.native.engine import NativeEngine
    from spmdrl.rollout.native.workspace import NativeOptions

    zeros = torch.zeros(1 << 17, CONFIG["hidden_size"])
    Decoder.forward = lambda self, tokens, *rest, **words: zeros[: len(tokens)]  # type: ignore
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        model = read_config(directory)
    engine = NativeEngine(model, options=NativeOptions(max_running=256, prefill_tokens=1 << 15))
    for name in engine.weights.table():
        engine.allocate(name).fill_(0.01)
    return engine


if __name__ == "__main__":
    main()
