"""The torch backend as plans know it: FSDP2 x tensor x context x expert parallelism."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.compiled import is_compiled
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
        if spec.train.compile != "none":
            _check_compiled(spec)

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


def _check_compiled(spec: RoleSpec) -> None:
    """Refuse what compiled layers cannot compute.

    Raises:
        ValueError: the role's key, what it cannot be joined with, and the fix.
    """
    key = f"roles.{spec.name}"
    given = f"{key}.train.compile={spec.train.compile}"
    others = [i for i, layer in enumerate(spec.model.layers) if not is_compiled(layer)]
    if others:
        raise ValueError(
            f"{given}: layer {others[0]} of {spec.model.architecture} has neither full nor sliding "
            f"attention, and others are not compiled: set {key}.train.compile=none"
        )
    if spec.trained and spec.adapter is not None and spec.adapter.dropout > 0:
        raise ValueError(
            f"{given} with {key}.adapter.dropout={spec.adapter.dropout}: masks differ from layer "
            f"to layer, which one graph for all layers cannot: set {key}.adapter.dropout=0, or "
            f"{key}.train.compile=none"
        )
