"""`Assembly`: the working roles of a run, and what every rank holds of their models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spmdrl.memory.device_parts import DeviceParts
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.local_shards import WeightLayout
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.calls import Role
from spmdrl.roles.handles import Rollout
from spmdrl.roles.judge import Judge
from spmdrl.roles.model_calls import ModelRole
from spmdrl.roles.policy_sync import PolicySync


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model under an adapter or a head: its directory and the weights in it."""

    path: Path
    weights: TensorSource


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Roles by name, the slices of their models on each rank, and the syncs between them.

    Args:
        specs: the roles with a model, as planned.
        trained: the roles that have an optimizer.
        bases: the models under those of them that only train an adapter or a head.
    """

    specs: Mapping[str, RoleSpec]
    roles: Mapping[str, Role]
    trained: Mapping[str, ModelRole]
    layouts: Mapping[str, WeightLayout]
    state_layouts: Mapping[str, WeightLayout]
    syncs: Mapping[tuple[str, str], PolicySync]
    parts: DeviceParts
    bases: Mapping[str, Base]

    def close(self) -> None:
        """Close the engines after a run without errors, before the process groups end."""
        for role in self.roles.values():
            if isinstance(role, Rollout | Judge) and role.engine is not None:
                role.engine.close()
