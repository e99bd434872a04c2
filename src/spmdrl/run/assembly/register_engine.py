"""Registration of an engine's parts with the memory of this rank."""

from __future__ import annotations

from collections.abc import Mapping

from spmdrl.memory.parts import PartKey, Residency
from spmdrl.memory.registry import PartRegistry
from spmdrl.memory.storages import live_bytes
from spmdrl.planning.parts import captured_parts
from spmdrl.role_spec import RoleSpec
from spmdrl.roles.generation import GRAPHS, KV_CACHE
from spmdrl.roles.model_calls import WEIGHTS
from spmdrl.rollout.native.engine import NativeEngine
from spmdrl.rollout.protocol import RolloutEngine
from spmdrl.rollout.vllm_engine import VllmEngine


def register_engine(
    spec: RoleSpec,
    engine: RolloutEngine,
    registry: PartRegistry,
    residencies: Mapping[PartKey, Residency],
    most_cache: int | None,
) -> None:
    """Register weights, cache and graphs of an engine, whose weights are on the device.

    Args:
        residencies: those of all roles' parts.
        most_cache: bytes of its cache in the plan; None: no bound.
    """
    name = spec.name
    tensors = [tensor for tensor, _ in engine.local_tensors().values()]
    if isinstance(engine, VllmEngine) and residencies[name, WEIGHTS] != "keep":
        registry.register_foreign(
            name,
            WEIGHTS,
            num_bytes=live_bytes(tensors) + engine.cache_bytes(),
            leave=engine.sleep,
            bring=engine.wake,
            residency=residencies[name, WEIGHTS],
        )
        return
    native = engine if isinstance(engine, NativeEngine) else None
    registry.register(
        name,
        WEIGHTS,
        tensors=tensors,
        residency=residencies[name, WEIGHTS],
        frozen=spec.is_judge,
        memory=None if native is None else native.weights.memory,
    )
    registry.register_droppable(
        name,
        KV_CACHE,
        drop=engine.release_cache,
        num_bytes=engine.cache_bytes,
        most=most_cache,
        is_mapped=native is not None and native.keeps_cache_address,
        residency=residencies[name, KV_CACHE],
    )
    if engine.captures_graphs:
        registry.register_droppable(
            name,
            GRAPHS,
            drop=engine.release_graphs,
            num_bytes=engine.graph_bytes,
            residency=residencies[name, GRAPHS],
            holds=captured_parts(spec, registry.by_key[name, WEIGHTS]),
        )
