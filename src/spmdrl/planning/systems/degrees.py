"""Degrees that do not divide a role's model, for systems that cut it as `Decoder` does."""

from __future__ import annotations

from spmdrl.models.degrees import check_cp, check_tp
from spmdrl.role_spec import RoleSpec


def check_degrees(spec: RoleSpec) -> None:
    """Refuse a tp, cp or ep that the role's model cannot be cut by.

    Raises:
        ValueError: the role, the degree and the model's sizes are named.
    """
    degrees = spec.placement.degrees
    try:
        # gradients of heads that several ranks hold would have to be summed
        replicate_kv = not (spec.trained or spec.is_vllm)
        check_tp(spec.model, degrees["tp"], ep=degrees["ep"], replicate_kv=replicate_kv)
        check_cp(spec.model, degrees["cp"])
    except ValueError as error:
        raise ValueError(f"roles.{spec.name}: {error}") from None
