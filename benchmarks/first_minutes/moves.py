"""Stage `moves`: page-locked memory, parts between device and host, captures, the allocator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from first_minutes.cases import Case, Outcome, Setting
from first_minutes.clock import wall_s
from first_minutes.decode import Steps
from first_minutes.fragments import LARGE, SEGMENT, SEGMENTS
from first_minutes.shapes import Load, make_engine, model_of
from spmdrl.memory.arena import HostArena
from spmdrl.memory.device_parts import DeviceParts
from spmdrl.memory.host_state import WINDOW_BYTES, HostState
from spmdrl.rollout.protocol import Request, SamplingParams


def cases(setting: Setting) -> Iterator[Case]:
    yield Case(name="pin", run=lambda: pin(setting))
    large, small = (1 << 22, 1 << 16) if setting.small else (1 << 30, 1 << 18)
    yield Case(name="large tensors", run=partial(parts, setting, 4, large))
    yield Case(name="small tensors", run=partial(parts, setting, 400, small))
    yield Case(name="optimizer in windows", run=lambda: windows(setting))
    yield Case(name="captures", run=lambda: captures(setting))
    for wanted in (False, True):
        name = f"expandable segments {'on' if wanted else 'off'}"
        yield Case(name=name, run=partial(segments, setting, wanted))


def pin(setting: Setting) -> Outcome:
    """Make a page-locked arena: the host must fill its pages, which is the prediction."""
    size = 1 << (20 if setting.small else 32)
    began = time.perf_counter()
    arena = HostArena(size, pinned=True)
    seconds = time.perf_counter() - began
    del arena
    return Outcome(
        predicted={"gb_s": setting.ceilings.fill_gb_s}, measured={"gb_s": size / seconds / 1e9}
    )


def parts(setting: Setting, count: int, num_bytes: int) -> Outcome:
    """Move a role's part to the host and back, against one large copy."""
    device = setting.device
    memory = DeviceParts(device)
    tensors = [torch.zeros(num_bytes // 4, device=device) for _ in range(count)]
    memory.registry.register("policy", "weights", tensors=tensors, residency="host")
    memory.settle()  # makes the arena
    memory.take_metrics()
    for _ in range(3):
        memory.prepare([("policy", "weights")])
        torch.cuda.synchronize()
        memory.settle()
    found = memory.take_metrics()
    ceilings = setting.ceilings
    return Outcome(
        predicted={
            "to_host_gb_s": ceilings.to_host_gb_s,
            "to_device_gb_s": ceilings.to_device_gb_s,
        },
        measured={
            "to_host_gb_s": found["to_host_gb_per_s"],
            "to_device_gb_s": found["to_device_gb_per_s"],
        },
        facts={"tensors": count, "gb": round(count * num_bytes / 1e9, 3)},
    )


def windows(setting: Setting) -> Outcome:
    """Let a state pass through the device in windows, as an optimizer's does that has no room.

    The prediction: both directions run at once, at the slower one's rate.
    """
    count = 1 << (18 if setting.small else 27)
    state = HostState(setting.device, window_bytes=WINDOW_BYTES // (512 if setting.small else 1))
    like = torch.empty(count)
    groups = [tuple(state.hold(like) for _ in range(3)) for _ in range(4)]

    def run() -> None:
        for ranges in state.passing(groups):
            for one in ranges:
                for tensor in one.here:
                    tensor.add_(1)

    run()  # touches the pages
    size, seconds = 4 * 3 * 4 * count, wall_s(run)
    rates = (setting.ceilings.to_host_gb_s, setting.ceilings.to_device_gb_s)
    known = [rate for rate in rates if rate is not None]
    return Outcome(
        predicted={"gb_s_each_way": min(known, default=None)},
        measured={"gb_s_each_way": size / seconds / 1e9},
        facts={"gb": round(size / 1e9, 3)},
    )


@contextmanager
def counted_captures() -> Iterator[list[int]]:
    """Count captures of CUDA graphs inside."""
    found, begin = [0], torch.cuda.CUDAGraph.capture_begin

    def counting(self: torch.cuda.CUDAGraph, *args: object, **kwargs: object) -> None:
        found[0] += 1
        begin(self, *args, **kwargs)  # type: ignore[arg-type]

    torch.cuda.CUDAGraph.capture_begin = counting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.cuda.CUDAGraph.capture_begin = begin  # type: ignore[method-assign]


def ending_one_by_one(count: int, prompt: int) -> list[Request]:
    """Make requests whose samples end one after another, so that every batch size occurs."""
    return [
        Request(
            tokens=(i + 3, *(5 + j % 400 for j in range(prompt - 1))),
            prompt_id=i,
            samples=(0,),
            sampling=SamplingParams(max_tokens=2 + i, ignore_eos=True),
        )
        for i in range(count)
    ]


def captures(setting: Setting) -> Outcome:
    """Time the captures of a call in which all batch sizes occur, first and after a release.

    The prediction: each capture runs the operations of a step once before, and captures them.
    """
    model = model_of("1.5B", small=setting.small)
    count, prompt = (4, 16) if setting.small else (64, 64)
    engine = make_engine(model, setting.device, cuda_graphs=True, weights=None)
    if not engine.captures_graphs:
        return Outcome(skipped=f"torch {torch.__version__} has no paged attention to capture")
    plain = make_engine(model, setting.device, cuda_graphs=False, weights=engine)
    load = Load(samples=4, prompt=prompt, response=5, group=4)
    operations = len(Steps.of(plain, load, 0, counted=True).operations())
    plain.close()
    requests = ending_one_by_one(count, prompt)

    def run() -> None:
        engine.generate(requests, seed=0, step=0)

    with counted_captures() as number:
        first_s = wall_s(run)
        made, pool = number[0], engine.graph_bytes()
        replayed_s = wall_s(run)
        engine.release_graphs()
        again_s = wall_s(run)
    return Outcome(
        predicted={"again_s": predicted_captures_s(setting, made, operations)},
        measured={
            "first_s": first_s - replayed_s,
            "again_s": again_s - replayed_s,
            "captures": made,
            "pool_gb": pool / 1e9,
        },
        facts={"operations": operations},
    )


def predicted_captures_s(setting: Setting, count: int, operations: int) -> float | None:
    launch, capture = setting.ceilings.launch_us, setting.ceilings.capture_us
    if launch is None or capture is None:
        return None
    return count * operations * (launch + capture) / 1e6


def segments(setting: Setting, wanted: bool) -> Outcome:
    """Ask for a large block where free memory is in pieces, in a fresh process.

    Only expandable segments can give the pieces' pages to it; without them it must fail.
    """
    unit = (20 if setting.small else 80) << 20  # pages are moved in steps of 20 MB
    words = [sys.executable, "-m", "first_minutes.fragments", str(unit)]
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": f"expandable_segments:{wanted}"}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:] or "no message")
    found = json.loads(done.stdout.splitlines()[-1])
    held = SEGMENTS * SEGMENT // 2 + LARGE if wanted else SEGMENTS * SEGMENT
    return Outcome(
        predicted={"fits": int(wanted), "reserved_gb": held * unit / 1e9}, measured=found
    )
