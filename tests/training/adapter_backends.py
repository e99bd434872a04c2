"""Adapters of a tiny model with values that are far from 0, and backends with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from training_cases import LivelyCheckpoint, tiny_config

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.adapters import Adapter, adapter_shapes, find_targets, make_adapter
from spmdrl.models.config import ModelConfig
from spmdrl.models.files.hf import TensorSource, random_tensor
from spmdrl.models.sharding import SCORE, Head, Slice
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import LossInput
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.world import World

CPU = torch.device("cpu")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def moe_config(**changes: Any) -> ModelConfig:
    return tiny_config("Qwen3MoeForCausalLM", **EXPERTS, norm_topk_prob=True, **changes)


def adapter_of(model: ModelConfig, *targets: str, **given: Any) -> Adapter:
    """An adapter with a rank that no degree divides."""
    names = find_targets(model, targets or ("all",))
    return make_adapter(names, **{"rank": 3, "alpha": 4.5, **given})


class WithAdded:
    """A model's lively weights, and random values of an adapter and of a scalar head."""

    def __init__(
        self,
        model: ModelConfig,
        adapter: Adapter | None = None,
        *,
        seed: int = 0,
        base: TensorSource | None = None,
    ) -> None:
        self._base = LivelyCheckpoint(model) if base is None else base
        self._shapes = {} if adapter is None else adapter_shapes(model, adapter)
        self._shapes[SCORE] = (1, model.hidden_size)
        self._seed = seed
        self.names = self._base.names | set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._base.shape(name)

    def read(self, part: Slice) -> Tensor:
        if part.name not in self._shapes:
            return self._base.read(part)
        box = tuple(slice(a, b) for a, b in zip(part.start, part.stop, strict=True))
        return self.whole(part.name)[box]

    def whole(self, name: str) -> Tensor:
        """An adapter's tensor, or the scalar head."""
        return random_tensor(name, self._shapes[name], self._seed) * 10


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


def value_loss(given: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    terms = given.columns["weight"] * given["values"].square() + 0.3 * given["values"]
    return terms.sum(), {"tokens": torch.tensor(float(len(terms))).double()}
