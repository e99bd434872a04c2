"""Adapters and shared bases of a plan, counted for `plan`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from spmdrl.memory.parts import dotted, size_text
from spmdrl.models.adapters import Adapter, adapter_shapes
from spmdrl.models.local_shards import counted
from spmdrl.models.sharding import global_shapes
from spmdrl.planning.plan import RolePlan
from spmdrl.role_spec import RoleSpec

Line = tuple[str, str, str]
"""A quantity's name, its value, and its derivation."""


def adapter_lines(plan: RolePlan, spec: RoleSpec) -> Iterator[Line]:
    """Yield what a role's adapter and base are, with bytes on the rank that has most."""
    if spec.is_rollout:
        if (use := plan.adapters.get(spec.name)) is not None:
            yield "policy's adapter", use.word, use.why
        return
    if spec.is_judge:
        if (own := spec.section.adapter) is not None:
            how = "into the judge's weights as they are read"
            if spec.base is not None:
                how = f"added to the base of {spec.base}"
            yield "adapter", "merged" if spec.base is None else "unmerged", f"{how}: {own.path}"
        if spec.base is not None:
            yield _base(plan, spec)
        return
    if spec.adapter is not None:
        yield from _counts(spec, spec.adapter)
    if spec.adapter is not None or spec.base is not None:
        if spec.trained:
            yield _trained(plan, spec)
        yield _base(plan, spec)


def _counts(spec: RoleSpec, adapter: Adapter) -> Iterator[Line]:
    ranks = sorted({own.rank for own in adapter.targets.values()})
    ranks_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    where = f"roles.{spec.name}.adapter"
    if adapter.shares_experts:
        where += ", one A and B for all experts of a layer"
    yield "adapter's matrices", f"{len(adapter.targets):,}", f"{ranks_text}, {where}"
    added = sum(map(math.prod, adapter_shapes(spec.model, adapter).values()))
    model = sum(map(math.prod, global_shapes(spec.model, spec.head).values()))
    share = f"{100 * added / model:.2g} % of the model's {model:,}"
    yield "adapter's parameters", f"{added:,}", share


def _trained(plan: RolePlan, spec: RoleSpec) -> Line:
    tables = plan.layouts[spec.name].values()
    most = max(
        sum(math.prod(held.shape) * count for held, count in counted(table) if not held.frozen)
        for table in {id(table): table for table in tables}.values()
    )
    how = "each with a float32 gradient and two moments"
    if spec.dtype.itemsize < 4:
        how = "each with a float32 gradient, a float32 master and two moments"
    return "values trained per rank", f"{most:,}", how


def _base(plan: RolePlan, spec: RoleSpec) -> Line:
    """The bytes of the fixed weights, and the roles that use them in place."""
    owner = spec.base or spec.name
    tables = {id(table): table for table in plan.layouts[owner].values()}.values()
    has_own = plan.specs[owner].adapter is not None
    size = max(
        sum(held.num_bytes * n for held, n in counted(table) if held.frozen or not has_own)
        for table in tables
    )
    part = dotted((owner, "base" if has_own else "weights"))
    if spec.base is not None:
        return "base", "shared", f"{part}, {size_text(size)} per rank"
    users = [name for name, other in plan.specs.items() if other.base == owner]
    policy = next((other for other in plan.specs.values() if other.kind == "policy"), None)
    if policy is not None and owner in (policy.name, policy.base):
        users += [name for name, sync in plan.syncs.items() if any(sync.shared.values())]
    how = f"per rank, used in place by {', '.join(users)}" if users else "per rank"
    return "base", size_text(size), how
