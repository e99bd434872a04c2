"""The project's own train backends as candidates of the contract, and how to try one on ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from harness import run_ranks
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.host_state import HostState
from spmdrl.models.files.hf import TensorSource
from spmdrl.role_spec import RoleSpec
from spmdrl.run.assembly.make_backend import make_backend
from spmdrl.testing.backend_contract import check_backend
from spmdrl.testing.cases import tiny_config
from spmdrl.testing.clause import Report
from spmdrl.testing.subject import Candidate, Layout
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend
from spmdrl.world import World

SHORT = {"microbatch_tokens": 25}
DEEP = {"recompute": "layer", "microbatch_tokens": 20}

TORCH = Candidate(
    name="torch",
    train={"backend": "torch"},
    layouts={
        1: (Layout(),),
        2: (
            Layout(degrees={"dp_shard": 2}),
            Layout(degrees={"dp_replicate": 2}, train=SHORT),
            Layout(degrees={"tp": 2}),
            Layout(degrees={"cp": 2}, train={"recompute": "layer"}),
            Layout(degrees={"dp_shard": 2}, train={**DEEP, "share_prompts": False}),
            Layout(degrees={"dp_shard": 2}, blocks=2),
        ),
        4: (
            Layout(degrees={"dp_shard": 2, "tp": 2}),
            Layout(degrees={"dp_replicate": 2, "cp": 2}),
            Layout(degrees={"dp_replicate": 2, "dp_shard": 2}, train=SHORT, blocks=2),
            Layout(degrees={"dp_shard": 2, "cp": 2}, train=SHORT),
            Layout(degrees={"dp_shard": 4}, blocks=2),
            Layout(degrees={"cp": 2, "tp": 2}),
        ),
    },
)
TIED = Candidate(
    name="torch with tied embeddings and biases",
    train={"backend": "torch"},
    model=tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True),
    layouts={
        2: (
            Layout(degrees={"dp_shard": 2}),
            Layout(degrees={"tp": 2}),
            Layout(degrees={"dp_shard": 2}, blocks=2),
        ),
        4: (
            Layout(degrees={"dp_shard": 2, "tp": 2}),
            Layout(degrees={"dp_replicate": 2, "cp": 2}),
        ),
    },
)


def in_windows(
    spec: RoleSpec, mesh: Mesh, weights: TensorSource, options: TrainOptions, *rest: Any
) -> TrainBackend | None:
    """Make the torch backend with an optimizer on the host, whose windows cut its tensors."""
    state = HostState(torch.device("cpu"), window_bytes=10_000)
    options = options.model_copy(update={"host_state": state})
    return make_backend(spec, mesh, weights, options, *rest)


WINDOWED = dataclasses.replace(TORCH, name="torch, optimizer in windows", make=in_windows)
MEGATRON = Candidate(
    name="megatron",
    train={"backend": "megatron"},
    layouts={
        1: (Layout(),),
        2: (
            Layout(degrees={"pp": 2}, train=SHORT),
            Layout(degrees={"tp": 2}, section={"megatron": {"sp": True}}),
            Layout(degrees={"cp": 2}),
            Layout(degrees={"dp_shard": 2}),
            Layout(degrees={"dp_replicate": 2}, train={"share_prompts": False}),
        ),
        4: (
            Layout(degrees={"tp": 2, "pp": 2}, section={"megatron": {"sp": True}}),
            Layout(degrees={"pp": 2, "dp_shard": 2}, train=SHORT),
            Layout(degrees={"dp_replicate": 2, "dp_shard": 2}),
        ),
    },
)


def try_candidate(
    world: World, candidate: Candidate, layouts: Collection[Layout], only: Collection[str]
) -> Report:
    return check_backend(candidate, world, layouts=layouts, only=only)


def report_of(
    candidate: Candidate, size: int, *layouts: Layout, only: Collection[str] = ()
) -> Report:
    """The report of all ranks, which is the same on each."""
    one, *others = run_ranks(try_candidate, size, candidate, layouts, only, timeout_s=280)
    assert all(list(other.lines()) == list(one.lines()) for other in others)
    print("\n".join(one.lines()))
    return one
