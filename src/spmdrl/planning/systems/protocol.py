"""`TrainSystem`: what plans and assembly know of a train backend before any of its ranks runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from spmdrl.distributed.mesh import Mesh
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.local_shards import Table, WeightLayout
from spmdrl.planning.systems.train_memory import TrainMemory
from spmdrl.role_spec import RoleSpec
from spmdrl.training.options import TrainOptions
from spmdrl.training.protocol import TrainBackend


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Messages of a backend between the ranks that have other rows, for forecasts of a step.

    Args:
        gathers_weights: whether each pass over a microbatch gathers the weights layer by layer.
        reduces_microbatches: whether each microbatch's gradients are reduced, not their sum only.
        shards_optimizer: whether each rank updates a part of what all of them compute with, which
            they gather afterwards.
        sums_whole: whether the ranks sum whole gradients although each needs a part of them.
        shard_axes: the axes along which weights are gathered, and microbatches' gradients reduced.
        offload: what the backend keeps and updates on the host.
    """

    gathers_weights: bool = False
    reduces_microbatches: bool = False
    shards_optimizer: bool = False
    sums_whole: bool = False
    shard_axes: tuple[str, ...] = ("dp_shard", "cp")
    offload: Literal["none", "optimizer", "all"] = "none"


class TrainSystem(Protocol):
    """A training system, such as torch's own, Megatron or a user's `module:Class`.

    It is a value without device or process groups, made on every rank of the world, also on those
    outside a role's mesh, and where nothing but a plan is made.
    """

    @property
    def axes(self) -> frozenset[str]:
        """Axes of `Mesh`, with `ep`, whose degrees may be above 1."""

    @property
    def freezes(self) -> bool:
        """Whether parameters of a role that trains may be fixed (`roles.NAME.freeze`)."""

    @property
    def has_adapters(self) -> bool:
        """Whether a role may have an adapter, or share another role's base."""

    @property
    def aligns_shards(self) -> bool:
        """Whether its shards can be cut in blocks that a rollout on the same ranks computes with,
        so that a sync sends nothing (see `layouts.shard_blocks`).
        """

    @property
    def splits_optimizer(self) -> bool:
        """Whether passes leave the optimizer's part alone, so that it may be away meanwhile."""

    def traffic(self, spec: RoleSpec) -> Traffic:
        """Return what it sends."""

    def memory(self, spec: RoleSpec, weights: Table, states: Table) -> TrainMemory:
        """Return the bytes that it adds to a rank's weights and activations.

        Args:
            weights, states: the rank's tables of `layout` and `state_layout`.
        """

    def check(self, spec: RoleSpec, specs: Mapping[str, RoleSpec]) -> None:
        """Refuse a role that it cannot have; `axes`, `freezes` and `has_adapters` are checked.

        Args:
            specs: all roles of the run.

        Raises:
            ValueError: something is not supported, or a package is missing; the message names the
                role's key and the fix.
        """

    def layout(
        self, spec: RoleSpec, blocks: int = 1, only: Collection[int] | None = None
    ) -> WeightLayout:
        """Return the weights on every rank of the role, in the dtype that it holds them in.

        Args:
            blocks: see `layouts.shard_blocks`; 1 unless `aligns_shards`.
            only: the ranks whose tensors are listed; None: all of the role's.
        """

    def state_layout(self, spec: RoleSpec, weights: WeightLayout) -> WeightLayout:
        """Return the float32 masters on every rank of `weights`; each moment is cut likewise.

        Args:
            weights: what `layout` returned.
        """

    def make(
        self,
        spec: RoleSpec,
        mesh: Mesh,
        weights: TensorSource,
        options: TrainOptions,
        device: torch.device,
        base: TrainBackend | None,
    ) -> TrainBackend:
        """Make the backend on a rank of the role; all of its ranks call this together.

        Args:
            weights: the initial weights: the model's, the adapter's and the scalar head's.
            base: the backend of this system whose weights it shares, or None.
        """
