"""Rules that a role's model must meet: degrees that divide it, and settings that need experts."""

from __future__ import annotations

from spmdrl.models.degrees import check_tp
from spmdrl.planning.layouts import megatron_options
from spmdrl.role_spec import RoleSpec
from spmdrl.training.megatron.checks import check_installed, check_megatron


def check_model(spec: RoleSpec, *, replays_routing: bool) -> None:
    """Refuse degrees that do not divide the role's model, and settings that need experts.

    Args:
        replays_routing: `algorithm.routing_replay`.

    Raises:
        ValueError: the model does not suit them (role and numbers are named), or megatron-core is
            missing where it is needed.
    """
    _check_experts(spec, replays_routing)
    if spec.backend == "megatron":
        check_installed(spec.name)
        check_megatron(spec.name, spec.model, spec.placement.degrees, megatron_options(spec))
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
