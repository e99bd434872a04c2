"""How long the plan of a weight sync takes, and how much memory, in one process.

    python benchmarks/sync_plan.py [--ranks 512] [--tp 8] [--layers 80] [--disjoint]

A Llama of 70 billion parameters, from FSDP over all ranks to replicas of `--tp`, on the same ranks
or on as many others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from itertools import pairwise

import torch

from spmdrl.models.config import parse_config
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.rank_rounds import rank_rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--disjoint", action="store_true")
    given = parser.parse_args()
    model = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": given.layers,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.perf_counter()]
    ranks = list(range(given.ranks))
    first = given.ranks if given.disjoint else 0
    source = model_layout(model, ranks, {"dp_shard": given.ranks}, torch.float32)
    degrees = {"dp_replicate": given.ranks // given.tp, "tp": given.tp}
    target = model_layout(model, [first + r for r in ranks], degrees, torch.bfloat16)
    times.append(time.perf_counter())
    plan = plan_sync(source, target, node_size=8)
    times.append(time.perf_counter())
    program = rank_rounds(plan, plan.rounds, first)
    times.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [round(b - a, 2) for a, b in pairwise(times)]
    messages = sum(len(p.sends) + len(p.receives) + len(p.casts) for p in program)
    result = {
        "layout_seconds": seconds[0],
        "plan_seconds": seconds[1],
        "program_seconds": seconds[2],
        "peak_growth_gb": round((peak - before) * 1024 / 1e9, 3),
        "rounds": len(plan.rounds),
        "routes": len(plan.routes),
        "groups": len(plan.groups),
        "messages_of_a_rank": messages,
        "bytes_over_lower_bound": plan.moved_bytes - plan.gathered_bytes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
