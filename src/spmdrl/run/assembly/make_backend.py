"""Construction of a role's train backend on this rank."""

from __future__ import annotations

import torch

from spmdrl.config.sections import Config
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.hf import TensorSource
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.systems.registry import train_system
from spmdrl.role_spec import RoleSpec
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend


def make_backend(
    spec: RoleSpec,
    mesh: Mesh,
    weights: TensorSource,
    options: TrainOptions,
    device: torch.device,
    base: TrainBackend | None,
) -> TrainBackend | None:
    """Make the role's backend on this rank; None outside its mesh.

    Args:
        base: the backend whose weights it shares, or None for weights of its own.
    """
    if not mesh.is_member:
        return None
    return train_system(spec).make(spec, mesh, weights, options, device, base)


def train_options(config: Config, spec: RoleSpec, blocks: int) -> TrainOptions:
    return TrainOptions(
        **spec.train.model_dump(),
        attention=config.model.attention,
        # there are none if the value's warm-up takes the whole run
        total_steps=max(1, config.num_optimizer_steps(spec.name)),
        param_dtype=spec.dtype,
        frozen=frozen_names(spec),
        blocks=blocks,
        seed=config.seed,
    )
