"""What adapters over one base save: memory and seconds of PPO and GRPO steps.

    python benchmarks/adapters.py --model DIR [--data FILE] [--ranks 2] [--steps 2] [--only ppo]

1. A PPO step with four roles: policy, value and reward model as adapters over one base and the base
   as the reference, against four models of their own, of which policy and value train whole.
2. A GRPO step with LoRA of rank 16 on all matrices, against TRL's GRPOTrainer with PEFT: the same
   questions, samples, tokens and optimizer steps (TRL samples until its limit or an end, too).

All sides run in turn, each in a fresh process (each rank one), `--repeats` times. Peaks are the
ranks' largest resident sets (VmHWM), added up; `part_gb` is what the ledger of parts holds on all
ranks at most. Seconds are medians of the steps after the first, and tokens those of prompts and
responses. Without --data the questions are sums. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import own_steps
import trl_steps

HERE = Path(__file__).resolve().parent
RANK, ALPHA = 16, 32


def main() -> None:
    options = parse()
    if options.side is not None:
        print(json.dumps(SIDES[options.side](options)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        if options.data is None:
            options.data = str(write_sums(Path(directory) / "sums.jsonl"))
        options.judge = str(write_judge(Path(directory) / "judge", Path(options.model)))
        for _ in range(options.repeats):
            for side in (s for s in SIDES if options.only is None or s.startswith(options.only)):
                found.setdefault(side, []).append(run_side(side, options))
                print(side, json.dumps(found[side][-1]), flush=True)
    print(json.dumps(summary(found)))


def summary(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Medians over the repeats, under the names of the last line."""

    def median(side: str, figure: str, digits: int = 3) -> float:
        return round(statistics.median(one[figure] for one in found[side]), digits)

    result: dict[str, float] = {}
    for kind in ("shared", "full"):
        if f"ppo_{kind}" in found:
            side = f"ppo_{kind}"
            result[f"ppo_gb_{kind}"] = median(side, "gb")
            result[f"part_gb_{kind}"] = median(side, "part_gb")
            result[f"ppo_seconds_{kind}"] = median(side, "seconds", 2)
    for side, name in (("grpo_lora", "grpo"), ("grpo_trl", "trl")):
        if side in found:
            result[f"{name}_seconds"] = median(side, "seconds", 2)
            result[f"{name}_gb"] = median(side, "gb")
            result[f"{name}_tokens"] = median(side, "tokens", 0)
    if "ppo_shared" in found:
        for what in ("base", "adapter"):
            result[f"sync_bytes_{what}"] = median("ppo_shared", f"sync_bytes_{what}", 0)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", help="JSONL with question and answer; default: sums")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=1, help="of every side")
    parser.add_argument("--steps", type=int, default=2, help="measured, after one warm-up")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("ppo", "grpo"))
    for name in ("side", "judge", "run-dir"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_sums(path: Path, count: int = 400) -> Path:
    """Write questions that differ, with answers."""
    rows = [
        {"question": f"What is {i} + {7 * i + 3}? Explain.", "answer": f"#### {8 * i + 3}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_judge(directory: Path, base: Path) -> Path:
    """Write the reward model as an adapter of the base: random values, and a scalar head."""
    import torch

    from spmdrl.models.adapters import adapter_shapes, find_targets, make_adapter
    from spmdrl.models.config import read_config
    from spmdrl.models.files.peft_export import write_adapter
    from spmdrl.models.sharding import SCORE

    model = read_config(base)
    adapter = make_adapter(find_targets(model, ["all"]), rank=RANK, alpha=ALPHA)
    shapes = {**adapter_shapes(model, adapter), SCORE: (1, model.hidden_size)}
    generator = torch.Generator().manual_seed(0)
    tensors = (
        (name, torch.randn(shape, generator=generator) * 0.02) for name, shape in shapes.items()
    )
    write_adapter(tensors, model, adapter, directory, base=base, head="score")
    return directory


def run_side(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one side in processes of its own, and return what its last line says."""
    names = ("model", "data", "judge", "num_prompts", "group_size", "max_tokens", "ranks", "steps")
    with tempfile.TemporaryDirectory() as directory:
        words = [str(HERE / "adapters.py"), "--side", side, "--run-dir", directory]
        for name in names:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        launch = ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={options.ranks}"]
        threads = max(1, (os.cpu_count() or 1) // options.ranks)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        command = [sys.executable, *(launch if options.ranks > 1 else []), *words]
        output = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    lines = [line for line in output.splitlines() if line.startswith('{"seconds"')]
    found: dict[str, float] = json.loads(lines[-1])
    return found


def trained(options: argparse.Namespace, words: Sequence[str]) -> dict[str, float]:
    """Train with the overrides, and return the figures of the steps."""
    given = [
        f"model.path={options.model}",
        f"data.train.source={options.data}",
        f"data.prompts_per_step={options.num_prompts}",
        f"data.group_size={options.group_size}",
        f"sampling.max_tokens={options.max_tokens}",
        f"steps={options.steps + 1}",
        f"rewards=[{{function: '{own_steps.REWARD}'}}]",
    ]
    figures, records = own_steps.timed([*given, *words], Path(options.run_dir))
    parts = [v for r in records for k, v in r.items() if k.startswith("memory/parts_gb/")]
    moved = [1e9 * r.get("sync/gb", 0.0) for r in records]
    return {
        **figures,
        # the largest rank's, and all ranks hold the same
        "part_gb": max(parts) * options.ranks,
        # what does not change is moved by the first sync only
        "sync_bytes_base": moved[0] - moved[-1],
        "sync_bytes_adapter": moved[-1],
    }


def lora() -> str:
    return f"adapter: {{rank: {RANK}, alpha: {ALPHA}}}"


def ppo(options: argparse.Namespace, roles: str) -> dict[str, float]:
    words = ["flow=ppo", f"roles={{{roles}}}", "rewards=[{role: reward}]", "algorithm.kl_coef=0.05"]
    return trained(options, words)


def ppo_shared(options: argparse.Namespace) -> dict[str, float]:
    """Train policy and value as adapters over the base of the reference and the reward model."""
    reward = f"reward: {{base: policy, adapter: {{path: '{options.judge}'}}}}"
    value = f"value: {{base: policy, head: normal, {lora()}}}"
    roles = f"policy: {{{lora()}}}, reference: {{base: policy}}, {reward}, {value}, rollout: {{}}"
    return ppo(options, roles)


def ppo_full(options: argparse.Namespace) -> dict[str, float]:
    """Train policy and value whole, with a reference and a reward model of their own."""
    reward = f"reward: {{adapter: {{path: '{options.judge}'}}}}"
    roles = f"policy: {{}}, reference: {{}}, {reward}, value: {{head: normal}}, rollout: {{}}"
    return ppo(options, roles)


def grpo_lora(options: argparse.Namespace) -> dict[str, float]:
    return trained(options, [f"roles={{policy: {{{lora()}}}, rollout: {{}}}}"])


def grpo_trl(options: argparse.Namespace) -> dict[str, float]:
    """Train with TRL's GRPOTrainer and PEFT: no KL, no recomputation, one update per rollout."""
    return trl_steps.grpo(
        trl_steps.Step(
            model=options.model,
            data=Path(options.data),
            prompts=options.num_prompts,
            group_size=options.group_size,
            max_tokens=options.max_tokens,
            steps=options.steps,
            directory=Path(options.run_dir),
            lora=(RANK, ALPHA),
            ranks=options.ranks,
        )
    )


Side = Callable[[argparse.Namespace], dict[str, float]]

SIDES: Mapping[str, Side] = {
    "ppo_shared": ppo_shared,
    "ppo_full": ppo_full,
    "grpo_lora": grpo_lora,
    "grpo_trl": grpo_trl,
}


if __name__ == "__main__":
    main()
