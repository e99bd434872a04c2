"""Check of a resume: fixed rows must give the same mean loss as when the weights were saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spmdrl.batch import Batch
from spmdrl.distributed.reduce import moments
from spmdrl.roles.calls import Call, together
from spmdrl.roles.canary import fixed_rows
from spmdrl.roles.handles import Policy, Value
from spmdrl.roles.model_calls import ModelRole, read_call
from spmdrl.training.readout import SCORES, VALUES, Readout, next_token
from spmdrl.world import World

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Differences that another layout's rounding may make, in nats or units of scores and values."""

ROUTED = 5.0
"""Factor on the tolerance for a mixture of experts: rounding sends some tokens to other experts."""


class LossCheck:
    """Compares the means of a column that each trained role computes for fixed rows.

    Args:
        roles: name -> trained role.
        tolerance: largest difference allowed, see `TOLERANCES`.
    """

    def __init__(self, world: World, roles: Mapping[str, ModelRole], tolerance: float) -> None:
        self._world, self._roles, self._tolerance = world, roles, tolerance

    def losses(self) -> dict[str, float]:
        """Role -> mean of its column, the same on every rank; every rank of the world calls it."""
        calls = [self._call(role) for role in self._roles.values()]
        found = {}
        for name, call, columns in zip(self._roles, calls, together(*calls), strict=True):
            column = next(iter((*columns.tokens.values(), *columns.rows.values())))
            mask = call.batch["loss_mask"] if columns.tokens else None
            found[name] = moments(column, mask).mean
        return found

    def compare(self, saved: Mapping[str, float], where: str) -> None:
        """Check that the roles, as they are now, give the means that a checkpoint holds.

        Raises:
            ValueError: a role gives another mean (raised on every rank).
        """
        for name, loss in self.losses().items():
            routed = self._roles[name].model.moe is not None
            tolerance = self._tolerance * (ROUTED if routed else 1.0)
            if name in saved and not abs(loss - saved[name]) <= tolerance:
                raise ValueError(
                    f"roles.{name}: the weights of {where} give {loss!r} on fixed rows, and gave "
                    f"{saved[name]!r} when they were saved: they are not what was saved, or this "
                    "model, device or software computes something else with them"
                )

    def _call(self, role: ModelRole) -> Call[Batch]:
        rows = fixed_rows(self._world, role.mesh.size("dp"), role.model.vocab_size)
        readout = _readout(role)
        return read_call(role, "check", rows, readout, readout.columns).unrecorded()


def _readout(role: ModelRole) -> Readout:
    if isinstance(role, Policy):
        return next_token(1.0, entropy=False)
    return VALUES if isinstance(role, Value) else SCORES
