"""Layouts of a role's model: the tensors that every one of its ranks holds.

Rules that a role's model must meet: degrees that divide it, and settings that need experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from spmdrl.models.fsdp_cuts import fitting_blocks
from spmdrl.models.local_shards import WeightLayout
from spmdrl.planning.engines import vocab_multiple
from spmdrl.planning.frozen import frozen_names
from spmdrl.planning.systems.degrees import check_degrees
from spmdrl.planning.systems.protocol import TrainSystem
from spmdrl.planning.systems.registry import train_system
from spmdrl.role_spec import RoleSpec
from spmdrl.weights.layout import model_layout


def role_layout(
    spec: RoleSpec, blocks: int = 1, only: Collection[int] | None = None
) -> WeightLayout:
    """Every rank's tensors of a role's model (an engine's weights are never sharded).

    Args:
        blocks: see `shard_blocks`.
        only: the ranks whose tensors are listed; None: all of the role's.
    """
    if not spec.has_engine:
        return train_system(spec).layout(spec, blocks, only)
    degrees = dict(spec.placement.degrees)
    degrees["dp_replicate"] *= degrees["dp_shard"]
    degrees["dp_shard"] = 1
    return model_layout(
        spec.model,
        spec.placement.ranks,
        degrees,
        spec.dtype,
        head=spec.head,
        frozen=frozen_names(spec),
        vocab_multiple=vocab_multiple(spec),
        blocks=blocks,
        shard_dtype=spec.dtype,
        adapter=spec.adapter,
        only=only,
    )


def state_layout(spec: RoleSpec, layout: WeightLayout) -> WeightLayout:
    """Every rank's masters and moments of the optimizer, if there is one."""
    return layout if spec.has_engine else train_system(spec).state_layout(spec, layout)


def shard_blocks(spec: RoleSpec, specs: Mapping[str, RoleSpec]) -> int:
    """The number of blocks that align a policy's shards with a rollout on the same ranks, so that a
    rank trains what it generates with and a sync sends nothing, or with a judge over its base; 1 if
    there is none. Models that share the policy's base have its blocks.
    """
    if spec.has_engine:
        return 1
    base = spec.base or spec.name
    policy = next((s for s in specs.values() if s.kind == "policy"), None)
    if policy is None or (policy.base or policy.name) != base:
        return 1
    if not train_system(policy).aligns_shards:
        return 1
    own = policy.placement
    fitting = [
        fitting_blocks(spec.model, own.degrees, other.placement.degrees["tp"])
        for other in specs.values()
        if other.placement.ranks == own.ranks
        if other.is_rollout or (other.is_judge and other.base == base)
    ]
    return max(fitting, default=1)


def check_model(spec: RoleSpec, specs: Mapping[str, RoleSpec], *, replays_routing: bool) -> None:
    """Refuse degrees that do not divide the role's model, and settings that need experts.

    Args:
        specs: all roles.
        replays_routing: `algorithm.routing_replay`.

    Raises:
        ValueError: the model does not suit them (role and numbers are named), or megatron-core is
            missing where it is needed.
    """
    _check_experts(spec, replays_routing)
    _check_head(spec)
    if not spec.has_engine:
        system = train_system(spec)
        _check_features(spec, system)
        system.check(spec, specs)
        return
    check_degrees(spec)
    if spec.is_vllm and spec.shares_experts:
        degrees = spec.placement.degrees
        raise ValueError(
            f"roles.{spec.name}.ep={degrees['ep']} with roles.{spec.name}.tp={degrees['tp']}: "
            "vLLM's replicas generate each at its own pace and exchange no tokens, so set an ep "
            "that divides tp, or rollout.engine=native"
        )


def _check_features(spec: RoleSpec, system: TrainSystem) -> None:
    """Refuse what the role's backend does not have at all."""
    key, backend = f"roles.{spec.name}", f"train.backend={spec.backend}"
    for axis, degree in spec.placement.degrees.items():
        if degree > 1 and axis not in system.axes:
            raise ValueError(
                f"{key}.{axis}={degree} with {backend}: this backend divides nothing over {axis}: "
                f"leave {key}.{axis} out, or set {key}.train.backend to one that does"
            )
    if spec.section.freeze and not system.freezes:
        raise ValueError(
            f"{key}.freeze={list(spec.section.freeze)} with {backend}: this backend cannot keep "
            f"parameters of a role that trains: leave the key out, or set "
            f"{key}.train.backend=torch"
        )
    if not system.has_adapters and (spec.adapter is not None or spec.base is not None):
        asked = f"{key}.base={spec.base}" if spec.adapter is None else f"{key}.adapter"
        raise ValueError(
            f"{asked} with {backend}: this backend has no adapters: leave the key out, or set "
            f"{key}.train.backend=torch"
        )


def _check_experts(spec: RoleSpec, replays_routing: bool) -> None:
    """Refuse routing replay and a balance loss for a model without experts."""
    if spec.model.moe is not None:
        return
    lacks = f"the model of roles.{spec.name} ({spec.model.architecture}) has no experts"
    if replays_routing and spec.kind in ("policy", "rollout"):
        raise ValueError(f"algorithm.routing_replay=true, but {lacks}: set it to false")
    coefficient = spec.train.balance_coef
    if coefficient > 0 and spec.trained:
        raise ValueError(
            f"train.balance_coef={coefficient}, but {lacks}: set it, or "
            f"roles.{spec.name}.train.balance_coef, to 0"
        )


def _check_head(spec: RoleSpec) -> None:
    """Refuse a place to read that the model lacks, and what cannot hold the bias of its head."""
    key = f"roles.{spec.name}"
    if spec.section.readout == "before_padding" and spec.model.pad_id is None:
        raise ValueError(
            f"{key}.readout=before_padding: the model's config.json has no pad_token_id: set it "
            f"there, or {key}.readout=last"
        )
    if not spec.model.score_bias:
        return
    fix = f"leave it out, or make a new head without one ({key}.head=normal)"
    lacks = "and the scalar head of its model has a bias"
    if spec.base is not None:
        raise ValueError(f"{key}.base={spec.base} shares no bias of a head, {lacks}: {fix}")
    if spec.adapter is not None and spec.trained:
        raise ValueError(f"{key}.adapter trains no bias of a head, {lacks}: {fix}")
