"""Stage `decode`: milliseconds of a decode step, next to what its operations need at best."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from first_minutes.cards import scaled, total
from first_minutes.cases import Case, Outcome, Setting
from first_minutes.clock import profiled
from first_minutes.operations import Operation, OperationCount, device_s, host_s
from first_minutes.shapes import (
    Load,
    cache_per_token,
    make_engine,
    model_of,
    read_per_step,
)
from spmdrl.rollout.native.engine import NativeEngine


def cases(setting: Setting) -> Iterator[Case]:
    for name, sizes in (("1.5B", (8, 64, 256)), ("8B", (64,))):
        for samples in sizes[:1] if setting.small else sizes:
            case = f"{name}, n={samples}"
            yield Case(name=case, run=partial(decode, setting, name, samples))
        yield Case(name=f"{name}, kernels", run=partial(kernels, setting, name))


def load_of(setting: Setting, samples: int) -> Load:
    if setting.small:
        return Load(samples=min(samples, 8), prompt=24, response=6, group=4)
    return Load(samples=samples, prompt=896, response=128 if samples > 8 else 64)


@dataclass(kw_only=True)
class Steps:
    """Times and counts at the ends of an engine's steps, noted by its progress callback."""

    count: OperationCount | None
    times: list[float]
    places: list[int]

    @classmethod
    def of(cls, engine: NativeEngine, load: Load, step: int, *, counted: bool) -> Steps:
        """Generate, and note every step."""
        count = OperationCount() if counted else None
        steps = cls(count=count, times=[], places=[])

        def progress(*_: int) -> None:
            steps.times.append(time.perf_counter())
            steps.places.append(0 if count is None else len(count.operations))

        if count is None:
            engine.generate(load.requests(), seed=0, step=step, progress=progress)
        else:
            with count:
                engine.generate(load.requests(), seed=0, step=step, progress=progress)
        return steps

    def median_s(self, load: Load) -> float:
        """Median seconds of the later half of the decode steps, which all samples share."""
        ends = self.times[-max(2, load.response // 2) :]
        spans = sorted(b - a for a, b in pairwise(ends))
        return spans[len(spans) // 2]

    def operations(self) -> Sequence[Operation]:
        """Return the operations of the last step but one: the last one also ends the samples."""
        assert self.count is not None
        return self.count.operations[self.places[-3] : self.places[-2]]


def decode(setting: Setting, name: str, samples: int) -> Outcome:
    """Time decode steps.

    The prediction is the device's seconds for all operations of a step (counted without graphs)
    and attention's reads, and then the host's for those outside the graph, with which it waits for
    a step's tokens before it starts the next. The floor reads weights and cache once.
    """
    model, load = model_of(name, small=setting.small), load_of(setting, samples)
    engine = make_engine(model, setting.device, cuda_graphs=True, weights=None)
    plain = make_engine(model, setting.device, cuda_graphs=False, weights=engine)
    issued = Steps.of(plain, load, 0, counted=True).operations()
    plain.close()
    engine.generate(load.requests(), seed=0, step=0)  # captures
    outside = Steps.of(engine, load, 1, counted=True).operations()
    torch.cuda.synchronize()
    began = time.perf_counter()
    steps = Steps.of(engine, load, 2, counted=False)
    whole_s = time.perf_counter() - began
    engine.close()
    step_s = steps.median_s(load)
    ceilings = setting.ceilings
    read = load.samples * load.context * cache_per_token(model)
    predicted = total(device_s(issued, ceilings), ceilings.read_s(read))
    if engine.captures_graphs:
        predicted = total(predicted, host_s(outside, ceilings))
    else:  # without graphs the device follows the host
        predicted = max(filter(None, (predicted, host_s(issued, ceilings))), default=None)
    floor = ceilings.read_s(read_per_step(model) + read)
    return Outcome(
        predicted={"step_ms": scaled(predicted, 1e3)},
        measured={
            "step_ms": step_s * 1e3,
            "tokens_per_s": load.samples / step_s,
            "whole_call_tokens_per_s": load.samples * load.response / whole_s,
        },
        facts={
            "floor_ms": None if floor is None else round(floor * 1e3, 3),
            "share_of_floor": None if floor is None else round(floor / step_s, 3),
            "graphs": engine.captures_graphs,
            "operations": len(issued),
            "operations_outside_graphs": len(outside),
            "context": load.context,
        },
    )


def kernels(setting: Setting, name: str) -> Outcome:
    """List the kernels that take most of a short generation's time, by torch's profiler."""
    model = model_of(name, small=setting.small)
    full = load_of(setting, 64)
    load = Load(samples=full.samples, prompt=full.prompt, response=6, group=full.group)
    engine = make_engine(model, setting.device, cuda_graphs=True, weights=None)
    engine.generate(load.requests(), seed=0, step=0)
    return Outcome(
        facts={"top": profiled(lambda: engine.generate(load.requests(), seed=0, step=1))}
    )
