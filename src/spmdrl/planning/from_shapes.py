"""The plan of a world that need not exist, from a configuration and its models' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig, read_config, tiny
from spmdrl.placement import DeviceType, place_roles
from spmdrl.planning.known_models import is_known, known_model
from spmdrl.planning.margins import CONTEXT_BYTES
from spmdrl.planning.plan import RolePlan, plan_roles
from spmdrl.planning.sketch import KeptLayouts


def plan_from_shapes(
    config: Config,
    world_size: int,
    node_size: int,
    *,
    device_type: DeviceType,
    device_bytes: int | None = None,
    models: Mapping[str, ModelConfig] | None = None,
    refuses: bool = True,
    kept: KeptLayouts | None = None,
) -> RolePlan:
    """Plan the roles of a world of equal ranks.

    Nothing is asked of this host, except for the free memory of its GPU where `device_bytes` is
    not given.

    Args:
        node_size: ranks of a node.
        device_type: device of every rank.
        device_bytes: memory of each device, before anything uses it; `memory_gb` counts in its
            place.
        models: models of the roles, except users' own; by default read from their directories.
        refuses: False: also plan what does not fit, see `MemoryPlan.fits`.
        kept: see `plan_roles`.

    Raises:
        ValueError: as `place_roles` and `plan_roles`, or a model that cannot be read.
    """
    placements = place_roles(config, world_size, node_size)
    if models is None:
        models = read_models(config)
    ranks = [device_type] * world_size
    free = None if device_bytes is None else max(0, device_bytes - CONTEXT_BYTES)
    return plan_roles(
        config, placements, models, ranks, node_size, free, refuses=refuses, kept=kept
    )


def read_models(config: Config) -> dict[str, ModelConfig]:
    """Read the models of all roles except users' own, at their toy sizes with `model.tiny`.

    A path may also be the name of a known model, whose shapes need no files.

    Raises:
        ValueError: a model cannot be read.
    """
    read: dict[Path, ModelConfig] = {}
    models = {}
    for name in config.roles:
        if not config.is_users(name):
            path = config.model_path(name)
            if path not in read:  # one object for all, which are compared often
                known = is_known(str(path)) and not path.exists()
                model = known_model(str(path)) if known else read_config(path)
                read[path] = tiny(model) if config.model.tiny else model
            models[name] = read[path]
    return models
