"""Layers compiled by torch's compiler (`train.compile`): as they train without it, from few graphs.

Graphs are made as for a run, but run by torch's operations: Inductor takes a minute for what these
take seconds for. The tests marked `full` have its code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_runs import make_backend
from training_cases import loss_fn, make_rows, options, tiny_config

from harness import run_ranks
from spmdrl.models import compiled
from spmdrl.models.config import ModelConfig
from spmdrl.testing.cases import tiny_experts
from spmdrl.training.readout import next_token
from spmdrl.world import World

Case = dict[str, Any]
CASES: dict[str, tuple[bool, Case, Case]] = {
    "dense": (False, {}, {}),
    "experts": (True, {}, {}),
    "recomputed": (False, {"recompute": "layer"}, {}),
    "bfloat16": (False, {"param_dtype": torch.bfloat16}, {}),
    "sharded": (False, {}, {"dp_shard": 2}),
    "tensor parallel": (False, {}, {"tp": 2}),
}


def steps(world: World, model: ModelConfig, given: Case, degrees: Case) -> list[tuple[Any, ...]]:
    """Losses, norms and log-probabilities of steps whose microbatches have many lengths."""
    backend = make_backend(world, options(**given), model, **degrees)
    found = []
    for step in range(4):
        rows = make_rows([6 + step, 3, 9 + 2 * step], 3, seed=step)
        sums = backend.forward_backward(rows, loss_fn, next_token(), normaliser=10.0)
        taken = {leaf.name: leaf.gradient() for leaf in backend._trained}
        norm = backend.optim_step().grad_norm
        found.append((sums["loss"], norm, backend.forward(rows, next_token())["logprobs"], taken))
    return found
