"""The DeepSpeed backend as plans know it: ZeRO over all ranks with other rows or tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from spmdrl.config.roles import PartName
from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.local_shards import Table, WeightLayout
from spmdrl.models.zero_layout import zero_layout, zero_state_layout
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.systems.degrees import check_degrees
from spmdrl.planning.systems.protocol import Traffic
from spmdrl.planning.systems.train_memory import TrainMemory
from spmdrl.planning.systems.zero_memory import zero_memory
from spmdrl.role_spec import RoleSpec
from spmdrl.training.deepspeed.backend import DeepspeedBackend
from spmdrl.training.deepspeed.options import (
    DeepspeedOptions,
    Offload,
    check_installed,
    check_role,
)
from spmdrl.training.deepspeed.settings import check_user, engine_settings, read_user
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend


class DeepspeedSystem:
    """See `TrainSystem`."""

    axes = frozenset({"dp_replicate", "dp_shard", "cp", "tp"})
    aligns_shards = False
    freezes = has_adapters = splits_optimizer = True

    def traffic(self, spec: RoleSpec) -> Traffic:
        stage = spec.train.deepspeed.stage
        return Traffic(
            gathers_weights=stage == 3,
            reduces_microbatches=stage > 1 and not spec.has_fixed_base,
            shards_optimizer=stage < 3,
            # the ZeRO 1 of bfloat16 sums the whole gradient on every rank
            sums_whole=stage == 1 and spec.dtype == torch.bfloat16,
            shard_axes=("dp_replicate", "dp_shard", "cp"),
            offload=spec.train.deepspeed.offload,
        )

    def memory(self, spec: RoleSpec, weights: Table, states: Table) -> TrainMemory:
        options = deepspeed_options(spec)
        user = read_user(spec.name, options.config)
        return zero_memory(
            spec,
            weights,
            states,
            lambda num_values: engine_settings(_train(spec), options, num_values, user),
        )

    def check(self, spec: RoleSpec, specs: Mapping[str, RoleSpec]) -> None:
        options = deepspeed_options(spec)
        check_installed(spec.name)
        check_degrees(spec)
        check_role(
            spec.name,
            spec.placement.degrees,
            options,
            spec.model,
            spec.dtype,
            trainable=spec.trained,
            head=spec.head,
            adapter=spec.adapter,
            borrows=spec.base is not None,
        )
        _check_residency(spec, options)
        check_user(spec.name, _train(spec), options, read_user(spec.name, options.config))

    def layout(
        self, spec: RoleSpec, blocks: int = 1, only: Collection[int] | None = None
    ) -> WeightLayout:
        return zero_layout(
            spec.model,
            spec.placement.ranks,
            spec.placement.degrees,
            spec.train.deepspeed.stage,
            spec.dtype,
            spec.head,
            frozen=frozen_names(spec),
            adapter=spec.adapter,
            only=only,
        )

    def state_layout(self, spec: RoleSpec, weights: WeightLayout) -> WeightLayout:
        if not spec.trained:
            return weights
        return zero_state_layout(
            spec.model,
            spec.placement.ranks,
            spec.placement.degrees,
            spec.train.deepspeed.stage,
            spec.head,
            frozen=frozen_names(spec),
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
        assert base is None or isinstance(base, DeepspeedBackend), spec.name
        return DeepspeedBackend(
            mesh,
            spec.model,
            weights,
            options,
            device,
            deepspeed_options(spec),
            trainable=spec.trained,
            head=spec.head,
            adapter=spec.adapter,
            base=base,
        )


def deepspeed_options(spec: RoleSpec) -> DeepspeedOptions:
    """Return the role's section `train.deepspeed` as the backend takes it."""
    section = spec.train.deepspeed
    return DeepspeedOptions(stage=section.stage, offload=section.offload, config=section.config)


def _train(spec: RoleSpec) -> TrainOptions:
    return TrainOptions(**spec.train.model_dump(), param_dtype=spec.dtype)


def _check_residency(spec: RoleSpec, options: DeepspeedOptions) -> None:
    """Refuse to move a part to the host between calls that DeepSpeed holds there already."""
    held: dict[Offload, tuple[PartName, ...]] = {
        "none": (),
        "optimizer": ("optimizer",),
        "all": ("optimizer", "weights"),
    }
    for part in held[options.offload]:
        if spec.section.residency.get(part) == "host":
            raise ValueError(
                f"roles.{spec.name}.residency.{part}=host with train.deepspeed.offload="
                f"{options.offload}: DeepSpeed holds that part on the host already: leave one out"
            )
