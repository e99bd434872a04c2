"""A weight sync between two layouts, against the same messages sent bare.

    python benchmarks/weight_sync.py --src dp2,tp1 --dst tp2 [--model DIR] [--by-rows]

`dpN` shards over N ranks (FSDP) at the source and makes N replicas at the target; `repN` makes N
replicas on either side. `@2-3` after a layout places it on those ranks; default: from rank 0 on.
Shards that can line up with the target's ranks do, as in a run; `--by-rows` cuts them by rows all
the same. Starts its own ranks. The last line is one JSON object: medians of runs in turn, slowest
rank.

`bare_seconds` are the messages alone. `copy_seconds` are the copies that the layouts ask for beside
them, alone: of what a rank holds in another tensor, and of cells that lie scattered and are packed.
On a CPU the same cores do both, so that no sync could take less than their sum.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from spmdrl.distributed.reduce import world_max
from spmdrl.models.config import read_config
from spmdrl.models.degrees import check_tp
from spmdrl.models.fsdp_cuts import fitting_blocks
from spmdrl.models.local_shards import WeightLayout
from spmdrl.weights.checksums import first_difference
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.rank_rounds import RankRound
from spmdrl.weights.sync import WeightSync
from spmdrl.weights.views import copy_all
from spmdrl.world import World, start_world, stop_world

AXES = {"dp": "dp_shard", "rep": "dp_replicate", "tp": "tp", "pp": "pp", "cp": "cp"}
CONTIGUOUS = torch.contiguous_format
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True)
    parser.add_argument("--dst", required=True)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct-12-4")
    parser.add_argument("--src-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--dst-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--by-rows", action="store_true")
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if "RANK" in os.environ:
        world = start_world()
        result = measure(world, given)
        if world.is_first:
            print(json.dumps(result), flush=True)
        stop_world()
        return
    num_ranks = 1 + max(*parse(given.src, "src")[0], *parse(given.dst, "dst")[0])
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [f"--nproc-per-node={num_ranks}", str(Path(__file__).resolve()), *sys.argv[1:]]
    sys.exit(subprocess.run([*launch, *script], env=environment, check=False).returncode)


def parse(text: str, side: str) -> tuple[list[int], dict[str, int]]:
    """Ranks and degrees of a layout such as `dp2,tp2@1-4`."""
    shown, _, place = text.partition("@")
    degrees = {}
    for part in shown.split(","):
        letters = part.rstrip("0123456789")
        if letters not in AXES or letters == part:
            sys.exit(f"--{side} {text}: {part!r} is none of {', '.join(f'{a}N' for a in AXES)}")
        axis = AXES[letters]
        if side == "dst" and axis == "dp_shard":
            axis = "dp_replicate"
        degrees[axis] = degrees.get(axis, 1) * int(part[len(letters) :])
    first = int(place.partition("-")[0]) if place else 0
    return list(range(first, first + math.prod(degrees.values()))), degrees


class Holder:
    """An engine that only holds tensors."""

    def __init__(self, layout: WeightLayout, world: World) -> None:
        self._table, self._device = layout.get(world.rank, {}), world.device

    def adopt(self, local_name: str, tensor: Tensor) -> None:
        pass

    def allocate(self, local_name: str) -> Tensor:
        held = self._table[local_name]
        return torch.zeros(held.shape, dtype=held.dtype, device=self._device)


def measure(world: World, given: argparse.Namespace) -> dict[str, object]:
    model = read_config(given.model)
    ranks, degrees = parse(given.src, "src")
    engine_ranks, engine_degrees = parse(given.dst, "dst")
    tp = engine_degrees.get("tp", 1)
    check_tp(model, degrees.get("tp", 1))
    check_tp(model, tp, replicate_kv=True)
    lines_up = ranks == engine_ranks and not given.by_rows
    blocks = fitting_blocks(model, degrees, tp) if lines_up else 1
    source = model_layout(model, ranks, degrees, DTYPES[given.src_dtype], blocks=blocks)
    target = model_layout(model, engine_ranks, engine_degrees, DTYPES[given.dst_dtype])
    plan = plan_sync(
        source, target, node_size=world.local_size, bucket_bytes=given.bucket_mb * 10**6
    )
    generator = torch.Generator().manual_seed(world.rank)
    tensors = {
        name: (
            torch.randn(held.shape, generator=generator).to(world.device, held.dtype),
            held.slices,
        )
        for name, held in source.get(world.rank, {}).items()
    }
    own, wanted = source.get(world.rank, {}), target.get(world.rank, {})
    engine = Holder(target, world) if wanted else None
    sync = WeightSync(plan, own, wanted, tensors, engine, world.device)
    bare, copies = [Bare(sync, one) for one in sync.rounds], copies_of(sync)
    # of the first run: the host keeps the staging buffers after it
    extra = world_max(torch.tensor([float(growth(world, sync.run))])).item()
    seconds: dict[str, list[float]] = {"sync": [], "bare": [], "copy": [], "check": []}
    for turn in range(given.rounds + 1):
        took = {
            "sync": timed(world, sync.run),
            "bare": timed(world, lambda: run_bare(bare)),
            "copy": timed(world, lambda: copy_all(copies)),
        }
        if turn:
            for name, value in took.items():
                seconds[name].append(value)
    found: list[str | None] = []
    seconds["check"].append(timed(world, lambda: found.append(first_difference(sync))))
    assert found == [None], found
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    moved = plan.moved_bytes
    share = medians["bare"] / medians["sync"]
    both = (medians["bare"] + medians["copy"]) / medians["sync"]
    staged = world_max(torch.tensor([float(sync.staging_bytes)])).item()
    return {
        "src": given.src,
        "dst": given.dst,
        "bytes_moved": moved,
        "bytes_lower_bound": plan.gathered_bytes,
        "bytes_shared": plan.shared_bytes,
        "bytes_copied": plan.copied_bytes,
        "seconds": round(medians["sync"], 4),
        "gb_per_s": round(moved / medians["sync"] / 1e9, 3) if moved else None,
        "bare_seconds": round(medians["bare"], 4),
        "fraction_of_collective_rate": round(share, 3) if moved else None,
        "copy_seconds": round(medians["copy"], 4),
        "fraction_of_messages_and_copies": round(both, 3) if moved else None,
        "peak_extra_bytes": int(extra),
        "staging_bytes": int(staged),
        "bucket_bytes": given.bucket_mb * 10**6,
        "check_seconds": round(medians["check"], 4),
        "rounds": len(plan.rounds),
        "messages": sum(len(r.sends) + len(r.receives) + len(r.casts) for r in sync.rounds),
    }  # fmt: skip


@torch.no_grad()
def copies_of(sync: WeightSync) -> list[tuple[Tensor, Tensor]]:
    """(to, from) of this rank: copies within it, and into messages that have to be packed."""
    places, pairs = sync.views, []
    for one in sync.rounds:
        for name, cell in one.copies:
            value = places.source(name, cell)
            assert value is not None
            pairs += [(view, value) for view in places.target(name, cell)]
        for message in one.sends:
            values = [places.value(name, cell) for name, cell in message.cells]
            if len(values) > 1 or not values[0].is_contiguous():
                pairs += [(torch.empty_like(v, memory_format=CONTIGUOUS), v) for v in values]
    return pairs


class Bare:
    """The messages of a round from and to buffers that are there, and nothing else."""

    def __init__(self, sync: WeightSync, one: RankRound) -> None:
        def buffer(count: int) -> Tensor:
            return torch.ones(count, dtype=torch.uint8, device=sync.device)

        self._sync = sync
        self._sends = [(m, buffer(m.num_bytes)) for m in one.sends]
        self._receives = [(m, buffer(m.num_bytes)) for m in one.receives]
        self._casts = [(m, buffer(m.num_bytes)) for m in one.casts]

    def send(self) -> list[dist.Work]:
        ops = [dist.P2POp(dist.isend, b, m.peer, tag=m.tag) for m, b in self._sends]
        ops += [dist.P2POp(dist.irecv, b, m.peer, tag=m.tag) for m, b in self._receives]
        works: list[dist.Work] = dist.batch_isend_irecv(ops) if ops else []
        return works

    def cast(self) -> list[dist.Work]:
        works = []
        for message, value in self._casts:
            assert message.group is not None
            group = self._sync.groups[message.group]
            works.append(dist.broadcast(value, src=message.peer, group=group, async_op=True))
        return works


def run_bare(rounds: list[Bare]) -> None:
    """In the order of `WeightSync.run`, with as many rounds in flight."""
    sent: dict[int, list[dist.Work]] = {}
    casts: dict[int, list[dist.Work]] = {}
    for tick in range(len(rounds) + 2):
        if tick < len(rounds):
            sent[tick] = rounds[tick].send()
        if 0 <= tick - 1 < len(rounds):
            for work in sent.pop(tick - 1):
                work.wait()
            casts[tick - 1] = rounds[tick - 1].cast()
        for work in casts.pop(tick - 2, ()):
            work.wait()


def growth(world: World, run: Callable[[], object]) -> int:
    """Bytes by which the process (or its device's memory) grows at most while it runs."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
        before = torch.cuda.memory_allocated(world.device)
        run()
        world.synchronize()
        return torch.cuda.max_memory_allocated(world.device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew: proc(5)
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def timed(world: World, run: Callable[[], object]) -> float:
    """Seconds of the slowest rank; all begin at once."""
    dist.barrier()
    world.synchronize()
    began = time.perf_counter()
    run()
    world.synchronize()
    return float(world_max(torch.tensor([time.perf_counter() - began])).item())


if __name__ == "__main__":
    main()
