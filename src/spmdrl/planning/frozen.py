"""The parameters of a role that do not change."""

from __future__ import annotations

import fnmatch

from spmdrl.models.sharding import SCORE, fused_tensors, global_shapes
from spmdrl.role_spec import RoleSpec


def frozen_names(spec: RoleSpec) -> frozenset[str]:
    """The Hugging Face names of the parameters that do not change: those of `roles.NAME.freeze`, or
    all but a scalar head under an adapter and in a base that is shared.

    Raises:
        ValueError: no name fits a pattern; all parameters are frozen; or only some of those in one
            tensor (the projections of an attention, say).
    """
    patterns = spec.section.freeze
    tensors = fused_tensors(spec.model, spec.head)
    if (spec.adapter is not None or spec.base is not None) and not spec.has_engine:
        return frozenset(global_shapes(spec.model, spec.head)) - {SCORE}
    if not patterns:
        return frozenset()
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
