"""Layouts of a role's model: the tensors that every one of its ranks holds.

Rules that a role's model must meet: degrees that divide it, and settings that need experts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import torch

from spmdrl.models.degrees import check_tp
from spmdrl.models.fsdp_cuts import fitting_blocks
from spmdrl.models.local_shards import WeightLayout
from spmdrl.models.megatron_chunks import Cut
from spmdrl.models.megatron_layout import megatron_layout, megatron_state_layout
from spmdrl.models.sharding import SCORE, fused_tensors, global_shapes
from spmdrl.planning.engines import vocab_multiple
from spmdrl.role_spec import RoleSpec
from spmdrl.training.megatron.checks import (
    MegatronOptions,
    check_adapter,
    check_installed,
    check_megatron,
    model_cut,
)
from spmdrl.weights.layout import model_layout


def megatron_options(spec: RoleSpec) -> MegatronOptions:
    given = spec.section.megatron
    # the two layers of a tiny model cannot be interleaved
    return MegatronOptions(
        vpp=1 if spec.is_tiny else given.get("vpp", 1), sp=given.get("sp", False)
    )


def _megatron_cut(spec: RoleSpec) -> Cut:
    return model_cut(
        spec.placement.degrees,
        megatron_options(spec),
        spec.device,
        is_plain=spec.adapter is not None,
    )


def role_layout(spec: RoleSpec, blocks: int = 1) -> WeightLayout:
    """Every rank's tensors of a role's model (a rollout's weights are never sharded).

    Args:
        blocks: see `shard_blocks`.
    """
    placement, head = spec.placement, spec.head
    degrees = dict(placement.degrees)
    if spec.is_rollout:
        degrees["dp_replicate"] *= degrees["dp_shard"]
        degrees["dp_shard"] = 1
    if spec.backend == "megatron":
        cut = _megatron_cut(spec)
        return megatron_layout(
            spec.model,
            placement.ranks,
            degrees,
            cut,
            spec.dtype,
            head,
            frozen=frozen_names(spec),
            adapter=spec.adapter,
        )
    return model_layout(
        spec.model,
        placement.ranks,
        degrees,
        spec.dtype,
        head=head,
        frozen=frozen_names(spec),
        vocab_multiple=vocab_multiple(spec),
        blocks=blocks,
        # where matrices train, FSDP2 keeps the masters, and casts while it gathers
        shard_dtype=spec.dtype if spec.has_fixed_base else torch.float32,
        adapter=spec.adapter,
    )


def state_layout(spec: RoleSpec, layout: WeightLayout) -> WeightLayout:
    """Every rank's masters and moments: cut like the weights, or by Megatron's optimizer."""
    if spec.backend != "megatron":
        return layout
    placement, cut = spec.placement, _megatron_cut(spec)
    return megatron_state_layout(
        spec.model, placement.ranks, placement.degrees, cut, spec.head, adapter=spec.adapter
    )


def shard_blocks(spec: RoleSpec, specs: Mapping[str, RoleSpec]) -> int:
    """The number of blocks that align a policy's shards with a rollout on the same ranks, so that a
    rank trains what it generates with and a sync sends nothing; 1 if there is none. Roles that
    share the policy's base have its blocks.
    """
    base = spec.base or spec.name
    policy = next((s for s in specs.values() if s.kind == "policy"), None)
    if policy is None or (policy.base or policy.name) != base or policy.backend == "megatron":
        return 1
    own = policy.placement
    fitting = [
        fitting_blocks(spec.model, own.degrees, other.placement.degrees["tp"])
        for other in specs.values()
        if other.is_rollout and other.placement.ranks == own.ranks
    ]
    return max(fitting, default=1)


def frozen_names(spec: RoleSpec) -> frozenset[str]:
    """The Hugging Face names of the parameters that do not change: those of `roles.NAME.freeze`, or
    all but a scalar head under an adapter and in a base that is shared.

    Raises:
        ValueError: no name fits a pattern; all parameters are frozen; or only some of those in one
            tensor (the projections of an attention, say).
    """
    patterns = spec.section.freeze
    tensors = fused_tensors(spec.model, spec.head)
    if (spec.adapter is not None or spec.base is not None) and not spec.is_rollout:
        return frozenset(global_shapes(spec.model, spec.head)) - {SCORE}
    known = [part.name for parts in tensors.values() for part in parts]
    key = f"roles.{spec.name}.freeze={list(patterns)}"
    frozen: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(known, pattern)
        if not fitting:
            raise ValueError(f"{key}: no parameter fits {pattern!r}; there are {known[:4]} ...")
        frozen.update(fitting)
    for parts in tensors.values():
        inside = [part.name for part in parts if part.name in frozen]
        if 0 < len(inside) < len(parts):
            lacking = next(part.name for part in parts if part.name not in frozen)
            raise ValueError(
                f"{key}: {inside[0]} and {lacking} lie in one tensor, so freeze both or neither"
            )
    if len(frozen) == len(known):
        raise ValueError(f"{key}: that is every parameter; set roles.{spec.name}.trained: false")
    return frozenset(frozen)


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
    if spec.backend == "megatron":
        check_installed(spec.name)
        check_megatron(spec.name, spec.model, spec.placement.degrees, megatron_options(spec))
        if spec.adapter is not None:
            base = None if spec.base is None else specs[spec.base]
            check_adapter(
                spec.name,
                spec.adapter,
                plain_base=None if base is None or base.adapter is not None else base.name,
                device=spec.device,
            )
        return
    tp, ep = spec.placement.degrees["tp"], spec.placement.degrees["ep"]
    try:
        check_tp(spec.model, tp, ep=ep)
    except ValueError as error:
        raise ValueError(f"roles.{spec.name}: {error}") from None
    if spec.is_rollout and tp % ep:
        raise ValueError(
            f"roles.{spec.name}.ep={ep} with roles.{spec.name}.tp={tp}: the replicas of a rollout "
            "generate each at its own pace and exchange no tokens, so its ep must divide its tp"
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
