"""Judges over the base of another role: the tensors of it that a judge's engine computes with.

An engine uses them in place, so they must lie as it needs them: whole, or cut by the same tp, in
the dtype that is computed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from spmdrl.models.local_shards import Table, WeightLayout
from spmdrl.role_spec import RoleSpec
from spmdrl.weights.plan import find_shared


def base_names(spec: RoleSpec, table: Table) -> frozenset[str]:
    """The local names of a judge's tensors that are those of the role whose base it shares; none
    for a role with weights of its own.
    """
    if not spec.is_judge or spec.base is None:
        return frozenset()
    own = _factors(spec)
    return frozenset(
        local
        for local, held in table.items()
        if own.isdisjoint(piece.name for piece in held.slices)
    )


def check_bases(specs: Mapping[str, RoleSpec], layouts: Mapping[str, WeightLayout]) -> None:
    """Refuse judges whose engine cannot compute with the tensors that they share.

    Args:
        layouts: every rank's tensors of each role's model.

    Raises:
        ValueError: a tensor is cut otherwise, or of another dtype, or rows with an adapter would be
            exchanged between replicas.
    """
    for name, spec in specs.items():
        if not spec.is_judge or spec.base is None:
            continue
        key, degrees = f"roles.{name}.base={spec.base}", spec.placement.degrees
        if spec.adapter is not None and spec.shares_experts:
            raise ValueError(
                f"{key} with roles.{name}.ep={degrees['ep']}: rows that are exchanged between "
                "replicas have no adapter: set an ep that divides tp, or leave the base out"
            )
        in_place = find_shared(layouts[spec.base], layouts[name], _factors(spec))
        for rank, table in layouts[name].items():
            lacking = sorted(base_names(spec, table) - in_place[rank])
            if lacking:
                raise ValueError(
                    f"{key}: rank {rank} does not hold {lacking[0]} as an engine with "
                    f"roles.{name}.tp={degrees['tp']} computes with it, and a judge uses a base in "
                    f"place: set roles.{name}.tp and the degrees of {spec.base} so that it does "
                    f"(equal tp and roles.{spec.base}.dp_shard=1, say), or leave "
                    f"roles.{name}.base out, which reads a second copy"
                )


def _factors(spec: RoleSpec) -> frozenset[str]:
    """The names of the matrices of a role's adapter."""
    if spec.adapter is None:
        return frozenset()
    return frozenset(chain.from_iterable(map(spec.adapter.factors, spec.adapter.targets)))
