"""Specs of roles for tests, from a configuration and models."""

from __future__ import annotations

from collections.abc import Mapping

from spmdrl.config.sections import Config
from spmdrl.models.config import ModelConfig
from spmdrl.placement import DeviceType, place_roles
from spmdrl.role_spec import RoleSpec, make_specs


def specs_of(
    config: Config, model: ModelConfig, size: int = 1, device_type: DeviceType = "cpu"
) -> Mapping[str, RoleSpec]:
    """Specs of all roles in a world of `size` ranks, each with the same model."""
    models = dict.fromkeys(config.roles, model)
    devices = dict.fromkeys(config.roles, device_type)
    return make_specs(config, place_roles(config, size), models, devices)
