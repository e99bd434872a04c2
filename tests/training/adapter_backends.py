"""Torch backends with adapters whose values are far from 0."""

from __future__ import annotations

import torch

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.sharding import Head
from spmdrl.testing.cases import WithAdded, tiny_adapter, tiny_experts
from spmdrl.testing.cases import value_loss as value_loss
from spmdrl.training.options import TrainOptions
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

CPU = torch.device("cpu")
adapter_of, moe_config = tiny_adapter, tiny_experts
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def make_role(
    mesh: Mesh,
    model: ModelConfig,
    adapter: Adapter | None,
    given: TrainOptions,
    *,
    seed: int = 0,
    trainable: bool = True,
    head: Head = "lm",
    base: TorchBackend | None = None,
) -> TorchBackend:
    source = WithAdded(model, adapter, seed=seed)
    return TorchBackend(
        mesh,
        model,
        source,
        given,
        CPU,
        trainable=trainable,
        head=head,
        adapter=adapter,
        base=base,
    )


def mesh_of(world: World, degrees: dict[str, int], role: str = "policy") -> Mesh:
    return Mesh(role, range(world.size), degrees, "cpu")
