"""Choice of how a rollout samples with the policy's adapter: added to its base, or merged into it.

An engine that computes with the policy's own tensors adds the adapter to them: it needs no further
memory, and a sync moves the adapter alone. An engine with weights of its own can have it merged:
a sync then computes and moves whole matrices, and decoding costs nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

from spmdrl.config.data_sets import response_tokens
from spmdrl.config.sections import Config
from spmdrl.memory.parts import size_text
from spmdrl.models.adapters import share_of_tokens
from spmdrl.models.sharding import global_shapes
from spmdrl.planning.engines import samples_per_replica
from spmdrl.role_spec import RoleSpec
from spmdrl.weights.plan import SyncPlan

_MESSAGE = 20
"""Bytes of a device's memory that it reads in the time in which one byte comes from another rank:
about 7 within a node of H100s (3.35 TB/s against 450 GB/s), about 70 between nodes.
"""

_MERGE = 3
"""Accesses to each value of a matrix that is merged: read, written, and copied into the engine."""


@dataclass(frozen=True, kw_only=True)
class AdapterUse:
    """Whether a rollout has the policy's adapter merged into weights of its own, and why."""

    merged: bool
    why: str

    @property
    def word(self) -> str:
        return "merged" if self.merged else "unmerged"


def adapter_use(
    config: Config, policy: RoleSpec, rollout: RoleSpec, unmerged: SyncPlan
) -> AdapterUse:
    """Decide `rollout.adapters` for one rollout.

    Args:
        policy: a policy with an adapter.
        unmerged: the sync to an engine that applies the adapter as an addition to its base.

    Raises:
        ValueError: `rollout.adapters` is unmerged where the engine cannot do that.
    """
    if rollout.is_vllm:
        return AdapterUse(merged=True, why="vLLM samples with merged weights")
    if rollout.shares_experts:
        if config.rollout.adapters == "unmerged":
            raise ValueError(
                f"rollout.adapters=unmerged with roles.{rollout.name}.ep="
                f"{rollout.placement.degrees['ep']}: rows that are exchanged between replicas have "
                "no adapter, so set merged, or an ep that divides tp"
            )
        return AdapterUse(merged=True, why="its replicas exchange rows, which have no adapter")
    if config.rollout.adapters != "auto":
        return AdapterUse(
            merged=config.rollout.adapters == "merged",
            why=f"rollout.adapters={config.rollout.adapters}",
        )
    if any(unmerged.shared.values()):
        return AdapterUse(merged=False, why="its engine computes with the policy's base in place")
    adding = adding_bytes(config, policy, rollout)
    merging = merging_bytes(policy, rollout, unmerged)
    costs = (
        f"its weights are its own: merging costs {size_text(merging)} of memory traffic a sync, "
        f"adding {size_text(adding)} a step"
    )
    return AdapterUse(merged=merging <= adding, why=costs)


def adding_bytes(config: Config, policy: RoleSpec, rollout: RoleSpec) -> int:
    """Return a replica's memory traffic, in bytes, for adding the adapter in a step's decoding.

    Every decode step reads A and B; every token reads x again, writes and reads A x, and reads and
    writes W x.
    """
    adapter, shapes = policy.adapter, global_shapes(policy.model)
    assert adapter is not None, policy.name
    samples, tokens = samples_per_replica(config, rollout), response_tokens(config)
    steps = tokens * -(-samples // config.rollout.max_running)
    held = sum(own.rank * sum(shapes[name]) for name, own in adapter.distinct.items())
    per_token = 0.0
    for name, own in adapter.targets.items():
        rows, columns = shapes[name]
        share = share_of_tokens(policy.model, name)
        per_token += share * (columns + 2 * own.rank + 2 * rows)
    return round((steps * held + samples * tokens * per_token) * rollout.dtype.itemsize)


def merging_bytes(policy: RoleSpec, rollout: RoleSpec, unmerged: SyncPlan) -> int:
    """Return a replica's memory traffic, in bytes, for a sync that merges the adapter.

    The share of the matrices that come from other ranks is taken to be that of the whole model.
    """
    adapter, shapes = policy.adapter, global_shapes(policy.model)
    assert adapter is not None, policy.name
    values = sum(shapes[name][0] * shapes[name][1] for name in adapter.targets)
    lacking = unmerged.gathered_bytes / max(1, unmerged.gathered_bytes + unmerged.copied_bytes)
    return int(values * rollout.dtype.itemsize * (_MERGE + _MESSAGE * lacking))
