"""`spmdrl export`: a role as a checkpoint has it, as the run itself would export it.

One process does it, on a host without a GPU: a checkpoint's slices carry the names and shapes of
the Hugging Face files, whatever the backend and the layout that wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spmdrl.checkpoint.whole import WholeTensors, find_checkpoint
from spmdrl.config.sections import Config
from spmdrl.models.adapters import adapter_shapes
from spmdrl.models.files.hf import TensorSource
from spmdrl.models.files.merge import whole_slice
from spmdrl.models.sharding import global_shapes
from spmdrl.placement import place_roles
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.layouts import role_layout
from spmdrl.role_spec import RoleSpec, device_types, make_specs
from spmdrl.run.assembly.assembly import Model, building_order, open_models
from spmdrl.run.assembly.role_weights import role_weights
from spmdrl.run.base_sums import BASES, check_bases, checksum
from spmdrl.run.exporting import (
    Gathered,
    Wanted,
    Writer,
    model_directories,
    present,
    write_role,
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Directories that an export has written, and the checkpoint that it read."""

    checkpoint: Path
    role: str
    directories: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Choice of a checkpoint, a role and a place.

    Args:
        step: number of finished steps; None: the newest checkpoint.
        role: a role that trains; None: the policy, or the first that trains.
        directory: where to; None: `RUN/model_step_NNNNNNNN`, with `_ROLE` for another role.
    """

    step: int | None = None
    role: str | None = None
    directory: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A global tensor as the ranks of a run hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def export(config: Config, start: Mapping[str, Any], choice: Choice) -> Exported:
    """Write the role as `checkpoint.export_as` and `checkpoint.export_dtype` say.

    Args:
        config: the run's; it may name another place of the models.
        start: the last entry of the run's run.json.

    Raises:
        ValueError: there is no such checkpoint or role, the checkpoint is damaged or of another
            model, or a model's files are missing.
        OSError: a directory could not be written; an older one is untouched.
    """
    run_dir, name = Path(config.run_dir), _chosen(config, choice)
    path = find_checkpoint(run_dir / "checkpoints", choice.step)
    saved = WholeTensors(path, f"{name}.weights")
    spec, model = _planned(config, start, name)
    held = _held_tensors(spec)
    if missing := held.keys() - saved.names - frozen_names(spec):
        raise ValueError(
            f"{path} lacks {len(missing)} of the tensors that train in roles.{name} "
            f"({min(missing)}, ...): it is of another model, adapter or role"
        )
    if name in saved.state.get(BASES, {}):
        now = {name: {"path": str(spec.path.resolve()), "xxh3": checksum(model.weights)}}
        check_bases(saved.state[BASES], now, str(path))
    directory = choice.directory
    if directory is None:
        directory = model_directories(run_dir / f"model_{path.name}", _trained(config))[name]
    directory.parent.mkdir(parents=True, exist_ok=True)
    source = _Source(saved, role_weights(spec, model.weights, config.seed), held)
    written: list[Path] = []

    def write(own: Path, tensors: Gathered, writer: Writer) -> None:
        writer(own, present(tensors))
        written.append(own)

    write_role(config, spec, directory, source.take, write)
    return Exported(checkpoint=path, role=name, directories=tuple(written))


def _trained(config: Config) -> list[str]:
    """Roles that train, in the order in which a run exports them."""
    return [n for n in building_order(config) if not config.is_users(n) and config.is_trained(n)]


def _chosen(config: Config, choice: Choice) -> str:
    """Name of the role to export."""
    trained = _trained(config)
    if not trained:
        raise ValueError(f"no role of {config.run_dir} trains: there is nothing to export")
    if choice.role is None:
        return "policy" if "policy" in trained else trained[0]
    if choice.role not in trained:
        why = "it does not train" if choice.role in config.roles else "the run has no such role"
        raise ValueError(f"--role {choice.role}: {why}: name {' or '.join(trained)}")
    return choice.role


def _planned(config: Config, start: Mapping[str, Any], chosen: str) -> tuple[RoleSpec, Model]:
    """Plan one role for the ranks of a run's last start, and open its model.

    Raises:
        ValueError: its model's files are missing or do not fit it.
    """
    base = config.roles[chosen].base
    own = {name: config.roles[name] for name in config.roles if name in (chosen, base)}
    models = open_models(config.model_copy(update={"roles": own}))
    placements = place_roles(config, int(start["ranks"]), int(start["ranks_per_node"]))
    device = "cpu" if str(start["device"]).startswith("cpu") else "cuda"
    devices = device_types(config, placements, [device] * int(start["ranks"]))
    opened = {name: found.model for name, found in models.items()}
    specs = make_specs(config, placements, opened, devices)
    return specs[chosen], models[chosen]


def _held_tensors(spec: RoleSpec) -> dict[str, _Held]:
    """Map the global tensors of a role's model to the dtype in which its ranks held them, from
    which the run's own export is made.
    """
    added = {} if spec.adapter is None else adapter_shapes(spec.model, spec.adapter)
    every = global_shapes(spec.model, spec.head).keys() | added.keys()
    found: dict[str, _Held] = {}
    for rank in spec.placement.ranks:
        for local in role_layout(spec, only=[rank])[rank].values():
            for piece in local.slices:
                found.setdefault(piece.name, _Held(shape=piece.shape, dtype=local.dtype))
        if found.keys() >= every:
            break
    return found


class _Source:
    """Global tensors of a role: those that the checkpoint has, and the others of the model's files.

    Args:
        files: the values with which the role started.
        held: every global tensor of the role.
    """

    def __init__(self, saved: WholeTensors, files: TensorSource, held: Mapping[str, _Held]) -> None:
        self._saved, self._files, self._held = saved, files, held

    def take(self, wanted: Wanted) -> Gathered:
        """Yield tensors by name, in the dtype in which the run held them."""
        for name, held in self._held.items():
            if wanted(name):
                yield name, self._read(name, held.shape).to(held.dtype)

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name in self._saved.names:
            return self._saved.read(name, shape)
        return self._files.read(whole_slice(name, shape))
