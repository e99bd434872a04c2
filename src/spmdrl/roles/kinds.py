"""Kinds of roles with a model on a train backend, and their handles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.call_memory import CallMemory
from spmdrl.models.config import ModelConfig
from spmdrl.roles.handles import Policy, Reference, Reward, Value
from spmdrl.roles.model_calls import ModelRole
from spmdrl.training.protocol import TrainBackend

Handle = Callable[[str, Mesh, ModelConfig, TrainBackend | None, CallMemory | None], ModelRole]

HANDLES: Mapping[str, Handle] = {
    "policy": Policy,
    "reference": Reference,
    "teacher": partial(Reference, prefix="teacher"),
    "reward": Reward,
    "value": Value,
}
