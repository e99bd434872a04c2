"""Stage `sampling`: drawing tokens from logits, next to what its operations need at best."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from first_minutes.cards import scaled
from first_minutes.cases import Case, Outcome, Setting
from first_minutes.clock import wall_s
from first_minutes.operations import OperationCount, slower_s
from spmdrl.rollout.native.sampler import Sampler
from spmdrl.rollout.protocol import SamplingParams

KINDS = {
    "all tokens": SamplingParams(),
    "top_p 0.95": SamplingParams(top_p=0.95),
    "greedy": SamplingParams(temperature=0.0),
}


def cases(setting: Setting) -> Iterator[Case]:
    for rows in (4,) if setting.small else (64, 256):
        for name in KINDS:
            yield Case(name=f"{name}, n={rows}", run=partial(sample, setting, name, rows))


def sample(setting: Setting, name: str, rows: int) -> Outcome:
    """Time one draw per row; the floor reads bfloat16 logits once."""
    vocabulary = 512 if setting.small else 151936
    sampler = Sampler(vocabulary, setting.device)
    logits = torch.randn(rows, vocabulary, device=setting.device)
    params, keys = [KINDS[name]] * rows, list(range(rows))

    def draw() -> None:
        sampler.sample(logits, params, keys).tokens.tolist()

    draw()
    with OperationCount() as count:
        draw()
    seconds = wall_s(draw, repeats=10)
    floor = setting.ceilings.read_s(rows * vocabulary * 2)
    return Outcome(
        predicted={"ms": scaled(slower_s(count.operations, setting.ceilings), 1e3)},
        measured={"ms": seconds * 1e3},
        facts={
            "operations": len(count.operations),
            "floor_ms": None if floor is None else round(floor * 1e3, 4),
        },
    )
