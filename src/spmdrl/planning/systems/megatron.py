"""The Megatron backend as plans know it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.local_shards import Table, WeightLayout
from spmdrl.models.megatron_chunks import Cut
from spmdrl.models.megatron_layout import megatron_layout, megatron_state_layout
from spmdrl.placement import kept_megatron
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.systems.protocol import Traffic
from spmdrl.planning.systems.train_memory import TrainMemory, plain_memory, with_fsdp
from spmdrl.role_spec import RoleSpec
from spmdrl.training.megatron.checks import (
    MegatronOptions,
    check_adapter,
    check_installed,
    check_megatron,
    model_cut,
)
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend

if TYPE_CHECKING:
    from spmdrl.training.megatron.backend import MegatronBackend


class MegatronSystem:
    """See `TrainSystem`."""

    axes = frozenset({"pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"})
    freezes = aligns_shards = False
    has_adapters = splits_optimizer = True

    def traffic(self, spec: RoleSpec) -> Traffic:
        return Traffic(shards_optimizer=True)

    def memory(self, spec: RoleSpec, weights: Table, states: Table) -> TrainMemory:
        return with_fsdp(spec, plain_memory(spec, weights, states))

    def check(self, spec: RoleSpec, specs: Mapping[str, RoleSpec]) -> None:
        if spec.model.score_bias:
            raise ValueError(
                f"roles.{spec.name}.train.backend=megatron has no bias of a head, and the scalar "
                f"head of its model has a bias: set it to torch, or make a new head without one "
                f"(roles.{spec.name}.head=normal)"
            )
        check_installed(spec.name)
        check_megatron(spec.name, spec.model, spec.placement.degrees, megatron_options(spec))
        if spec.adapter is not None:
            base = None if spec.base is None else specs[spec.base]
            check_adapter(
                spec.name,
                spec.adapter,
                plain_base=None if base is None or base.adapter is not None else base.name,
                device=spec.device,
            )

    def layout(
        self, spec: RoleSpec, blocks: int = 1, only: Collection[int] | None = None
    ) -> WeightLayout:
        return megatron_layout(
            spec.model,
            spec.placement.ranks,
            spec.placement.degrees,
            _cut(spec),
            spec.dtype,
            spec.head,
            frozen=frozen_names(spec),
            adapter=spec.adapter,
            only=only,
        )

    def state_layout(self, spec: RoleSpec, weights: WeightLayout) -> WeightLayout:
        if not spec.trained:
            return weights
        return megatron_state_layout(
            spec.model,
            spec.placement.ranks,
            spec.placement.degrees,
            _cut(spec),
            spec.head,
            adapter=spec.adapter,
            only=weights,
        )

    def make(
        self,
        spec: RoleSpec,
        mesh: Mesh,
        weights: TensorSource,
        options: TrainOptions,
        device: torch.device,
        base: TrainBackend | None,
    ) -> TrainBackend:
        megatron = import_backend()
        assert base is None or isinstance(base, megatron), spec.name
        return megatron(
            mesh,
            spec.model,
            weights,
            options,
            device,
            megatron_options(spec),
            trainable=spec.trained,
            head=spec.head,
            adapter=spec.adapter,
            base=base,
        )


def import_backend() -> type[MegatronBackend]:
    """Import the Megatron backend's class, and megatron-core with it, only when it is needed."""
    with warnings.catch_warnings():
        # it warns several times that TransformerEngine and apex are missing, which is expected
        warnings.filterwarnings("ignore", message=".*[Aa]pex (is|are) not installed")
        from spmdrl.training.megatron.backend import MegatronBackend
    return MegatronBackend


def megatron_options(spec: RoleSpec) -> MegatronOptions:
    """Return the role's options of Megatron, without those that a fold leaves no room for."""
    given = kept_megatron(spec.section, spec.placement)
    # the two layers of a tiny model cannot be interleaved
    return MegatronOptions(
        vpp=1 if spec.is_tiny else given.get("vpp", 1), sp=given.get("sp", False)
    )


def _cut(spec: RoleSpec) -> Cut:
    return model_cut(
        spec.placement.degrees,
        megatron_options(spec),
        spec.device,
        is_plain=spec.adapter is not None,
    )
