"""Models of a configuration that are named by their names on the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from spmdrl.config.sections import Config
from spmdrl.models.files.hub import is_hub_name, local_directory


def with_local_models(config: Config, *, download: bool = True) -> Config:
    """Replace names on the hub by their directories in the cache; see `local_directory`.

    Every rank does so by itself, before the first collective.

    Args:
        download: whether to download missing models; if not, those whose shapes are known keep
            their names, by which plans find them.

    Raises:
        ValueError: a model is not in the cache, and cannot be downloaded.
    """
    changes: dict[str, Any] = {}
    if (path := _local(config.model.path, download)) != config.model.path:
        changes["model"] = config.model.model_copy(update={"path": path})
    roles = dict(config.roles)
    for name, role in config.roles.items():
        if role.model is not None and (path := _local(role.model, download)) != role.model:
            roles[name] = role.model_copy(update={"model": path})
    if roles != config.roles:
        changes["roles"] = roles
    return config.model_copy(update=changes) if changes else config


def _local(name: str, download: bool) -> str:
    if not is_hub_name(name):
        return name
    if not download:
        # imports torch, which commands that run need later
        from spmdrl.planning.known_models import is_known

        if is_known(name):
            return name
    return str(local_directory(name, download=download))
