"""The torch backend as plans know it: FSDP2 x tensor x context x expert parallelism."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.local_shards import Table, WeightLayout
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.systems.degrees import check_degrees
from spmdrl.planning.systems.protocol import Traffic
from spmdrl.planning.systems.train_memory import TrainMemory, plain_memory, with_fsdp
from spmdrl.role_spec import RoleSpec
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend
from spmdrl.training.torch_backend import TorchBackend
from spmdrl.weights.layout import model_layout


class TorchSystem:
    """See `TrainSystem`."""

    axes = frozenset({"dp_replicate", "dp_shard", "cp", "tp", "ep"})
    freezes = has_adapters = aligns_shards = splits_optimizer = True

    def traffic(self, spec: RoleSpec) -> Traffic:
        shards = spec.placement.degrees["dp_shard"] > 1
        return Traffic(
            gathers_weights=shards, reduces_microbatches=shards and not spec.has_fixed_base
        )

    def memory(self, spec: RoleSpec, weights: Table, states: Table) -> TrainMemory:
        return replace(with_fsdp(spec, plain_memory(spec, weights, states)), can_stream=True)

    def check(self, spec: RoleSpec, specs: Mapping[str, RoleSpec]) -> None:
        check_degrees(spec)

    def layout(
        self, spec: RoleSpec, blocks: int = 1, only: Collection[int] | None = None
    ) -> WeightLayout:
        return model_layout(
            spec.model,
            spec.placement.ranks,
            spec.placement.degrees,
            spec.dtype,
            head=spec.head,
            frozen=frozen_names(spec),
            blocks=blocks,
            # where matrices train, FSDP2 keeps the masters, and casts while it gathers
            shard_dtype=spec.dtype if spec.has_fixed_base else torch.float32,
            adapter=spec.adapter,
            only=only,
        )

    def state_layout(self, spec: RoleSpec, weights: WeightLayout) -> WeightLayout:
        return weights

    def make(
        self,
        spec: RoleSpec,
        mesh: Mesh,
        weights: TensorSource,
        options: TrainOptions,
        device: torch.device,
        base: TrainBackend | None,
    ) -> TrainBackend:
        assert base is None or isinstance(base, TorchBackend), spec.name
        return TorchBackend(
            mesh,
            spec.model,
            weights,
            options,
            device,
            trainable=spec.trained,
            head=spec.head,
            adapter=spec.adapter,
            base=base,
        )
