"""The training systems by name: `train.backend`, or a user's `module:Class`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from spmdrl.config.user_objects import lacks, make_object
from spmdrl.planning.systems.deepspeed import DeepspeedSystem
from spmdrl.planning.systems.megatron import MegatronSystem
from spmdrl.planning.systems.protocol import TrainSystem
from spmdrl.planning.systems.torch_native import TorchSystem
from spmdrl.role_spec import RoleSpec

SYSTEMS: Mapping[str, Callable[[], TrainSystem]] = MappingProxyType(
    {"torch": TorchSystem, "megatron": MegatronSystem, "deepspeed": DeepspeedSystem}
)
"""Name -> the system that the package has under it."""

SHARDS_REPLICAS = frozenset({"deepspeed"})
"""Systems that divide over all ranks with other rows, both dp_shard and dp_replicate: ZeRO."""

_ATTRIBUTES = ("axes", "freezes", "has_adapters", "aligns_shards", "splits_optimizer")
_METHODS = {
    "traffic": ("spec",),
    "memory": ("spec", "weights", "states"),
    "check": ("spec", "specs"),
    "layout": ("spec", "blocks", "only"),
    "state_layout": ("spec", "weights"),
    "make": ("spec", "mesh", "weights", "options", "device", "base"),
}
"""Names that a user's class must have, and its methods' arguments."""


def train_system(spec: RoleSpec) -> TrainSystem:
    """Return the system that a role trains with, or is computed with if it is frozen.

    Raises:
        ValueError: see `named_system`.
    """
    assert not spec.has_engine, spec.name
    key = f"roles.{spec.name}.train.backend"
    return named_system(key, spec.backend, spec.train.backend_options)


def named_system(key: str, name: str, options: Mapping[str, Any]) -> TrainSystem:
    """Return a system by its name, or make a user's one.

    Args:
        key: the key that gives the name, for errors.
        options: keyword arguments of a user's class.

    Raises:
        ValueError: the class cannot be loaded or made, or lacks something of `TrainSystem`.
    """
    if name in SYSTEMS:
        return SYSTEMS[name]()
    made: TrainSystem = make_object(name, options, key, "train.backend_options")
    missing = [attribute for attribute in _ATTRIBUTES if not hasattr(made, attribute)]
    lacking = f"has no {missing[0]!r}: a TrainSystem has one" if missing else None
    lacking = lacking or lacks(made, _METHODS)
    if lacking is not None:
        raise ValueError(f"{key}={name}: the class {type(made).__name__} {lacking}")
    return made
