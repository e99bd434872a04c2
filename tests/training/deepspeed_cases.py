"""DeepSpeed backends of tiny models on these ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from backend_runs import RowsOf, rows_of_step, train
from training_cases import LivelyCheckpoint, options

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Head
from spmdrl.models.zero_layout import Stage
from spmdrl.training.deepspeed.backend import DeepspeedBackend
from spmdrl.training.deepspeed.options import DeepspeedOptions, Offload
from spmdrl.world import World

CPU = torch.device("cpu")

Case = tuple[dict[str, int], DeepspeedOptions, dict[str, Any]]
"""Degrees, DeepSpeed's options, and what of `options` differs."""


def case(
    stage: Stage = 2,
    offload: Offload = "none",
    given: dict[str, Any] | None = None,
    **degrees: int,
) -> Case:
    return degrees, DeepspeedOptions(stage=stage, offload=offload), given or {}


def make_backend(
    world: World,
    model: ModelConfig,
    made: Case,
    *,
    role: str = "policy",
    ranks: list[int] | None = None,
    trainable: bool = True,
    head: Head = "lm",
    checkpoint: Any = None,
    adapter: Adapter | None = None,
    base: Any = None,
) -> DeepspeedBackend:
    degrees, deepspeed, changes = made
    return DeepspeedBackend(
        Mesh(role, range(world.size) if ranks is None else ranks, degrees, "cpu"),
        model,
        LivelyCheckpoint(model) if checkpoint is None else checkpoint,
        options(**changes),
        CPU,
        deepspeed,
        trainable=trainable,
        head=head,
        adapter=adapter,
        base=base,
    )


def brief(names: Iterable[str], *always: str) -> list[Any]:
    """Parameters of a test: names, all but some of them in the long sweeps only."""
    return [pytest.param(n, marks=() if n in always else pytest.mark.full) for n in names]


def asked(request: pytest.FixtureRequest, test: str) -> list[str]:
    """The names with which a test of the module is to run, for a launch that serves them all."""
    found = []
    for item in request.session.items:
        if item.path == request.path and item.originalname == test:  # type: ignore[attr-defined]
            found.append(item.callspec.params["name"])  # type: ignore[attr-defined]
    return found


def run_cases(
    world: World, model: ModelConfig, cases: dict[str, Case], rows_of: RowsOf = rows_of_step
) -> dict[str, dict[str, Any]]:
    return {name: train(make_backend(world, model, made), rows_of) for name, made in cases.items()}
