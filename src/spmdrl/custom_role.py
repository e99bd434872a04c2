"""A user's own role: a class with a few functions, on ranks of its own like any other role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.calls import Call, RoleMethod
from spmdrl.distributed.exchange import Column
from spmdrl.distributed.mesh import Mesh
from spmdrl.ledger import Stint
from spmdrl.memory.turns import Turns

__all__ = ["Column", "CustomRole", "RoleContext", "UserRole"]


@dataclass(frozen=True, kw_only=True)
class RoleContext:
    """What a user's role is given on the ranks where it runs.

    Args:
        name: of the role in the configuration.
        mesh: its ranks and groups; each replica (`dp`) gets rows of its own.
        device: where this rank computes.
        model: the directory that `roles.NAME.model` or `model.path` names.
        seed: of the run.
    """

    name: str
    mesh: Mesh
    device: torch.device
    model: Path
    seed: int


class UserRole(Protocol):
    """What the class behind `kind: module:Class` offers. It is made on every rank with
    `roles.NAME.options` as keyword arguments; `setup` and the steps run on the role's ranks alone.

    `needs` names the columns that travel to the role: tensors, or texts (`prompt_text`, `response`,
    `answer`). `returns` says what comes home. These functions are optional:
    `train_step(batch) -> metrics`, which may change the role, and `eval_step(batch) -> columns`,
    which is called in place of `forward_step` in evaluations. A role that changes also offers
    `save_state() -> tensors by name` and `load_state(tensors)`: they are in every checkpoint, for
    each rank its own, and come back on the same ranks.
    """

    needs: Sequence[str]
    returns: Sequence[Column]

    def setup(self, context: RoleContext) -> None: ...

    def forward_step(self, batch: Batch) -> Mapping[str, Tensor]:
        """The columns of `returns` for these rows: `[T]` token columns, `[B]` row columns."""
        ...


class CustomRole:
    """The handle of a user's role.

    Methods: `forward(batch)` and `evaluate(batch)` return the declared columns of the home rows;
    `train(batch)` returns `train_step`'s metrics.
    """

    def __init__(self, name: str, mesh: Mesh, user: UserRole, memory: Turns | None = None) -> None:
        self.name, self.mesh, self.user, self.memory = name, mesh, user, memory
        _check_declared(name, user)
        self.forward = RoleMethod(self._forward)
        self.evaluate = RoleMethod(self._evaluate)
        self.train = RoleMethod(self._train)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the role on this rank."""
        if not self.mesh.is_member or not hasattr(self.user, "save_state"):
            return {}
        return dict(getattr(self.user, "save_state")())  # noqa: B009 (optional method)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` had returned on this rank."""
        if tensors:
            getattr(self.user, "load_state")(tensors)  # noqa: B009 (optional method)

    def _forward(self, batch: Batch) -> Call[Batch]:
        return self._columns(batch, "forward_step")

    def _evaluate(self, batch: Batch) -> Call[Batch]:
        own = hasattr(self.user, "eval_step")
        return self._columns(batch, "eval_step" if own else "forward_step")

    def _columns(self, batch: Batch, method: str) -> Call[Batch]:
        def compute(rows: Batch, stint: Stint) -> Batch:
            columns = getattr(self.user, method)(rows)
            return checked_columns(f"{self.name}.{method}", rows, columns, self.user.returns)

        return Call(
            role=self,
            method=method,
            batch=batch,
            needs=tuple(self.user.needs),
            returns=tuple(self.user.returns),
            compute=compute,
            finish=lambda home: home,
            atom=batch["prompt_ids"],
        )

    def _train(self, batch: Batch) -> Call[dict[str, float]]:
        if not hasattr(self.user, "train_step"):
            raise ValueError(
                f"roles.{self.name} ({type(self.user).__name__}) has no train_step: add "
                "train_step(batch) -> metrics to the class, or do not train it"
            )

        def compute(rows: Batch, stint: Stint) -> dict[str, float]:
            return dict(getattr(self.user, "train_step")(rows))  # noqa: B009 (optional method)

        return Call(
            role=self,
            method="train_step",
            batch=batch,
            needs=tuple(self.user.needs),
            returns=(),
            compute=compute,
            finish=lambda metrics: metrics,
            writes=True,
            atom=batch["prompt_ids"],
        )


def checked_columns(
    where: str, rows: Batch, columns: Mapping[str, Tensor], returns: Sequence[Column]
) -> Batch:
    """A role's columns as rows that can go home.

    Raises:
        ValueError: a declared column is missing, is no tensor, has not one entry per token or row,
            or has a value that is not finite; the first bad row is named.
    """
    tokens: dict[str, Tensor] = {}
    row_columns: dict[str, Tensor] = {}
    for column in returns:
        if column.name not in columns:
            raise ValueError(f"{where} returned {sorted(columns)}, but declares {column.name!r}")
        values = columns[column.name]
        if not isinstance(values, Tensor):
            raise ValueError(f"{where}: {column.name!r} is a {type(values).__name__}, no tensor")
        per_token = column.kind == "token"
        count = rows.num_tokens if per_token else rows.num_rows
        if tuple(values.shape) != (count, *column.shape):
            raise ValueError(
                f"{where}: {column.name!r} has the shape {tuple(values.shape)}, but it is a "
                f"{column.kind} column and there are {count} {'tokens' if per_token else 'rows'}: "
                f"return {(count, *column.shape)}"
            )
        values = values.detach().to("cpu", column.dtype)
        if values.is_floating_point():
            bad = (~torch.isfinite(values.reshape(count, -1))).any(1).nonzero().flatten()
            if len(bad):
                at = int(rows.row_of_token()[bad[0]]) if per_token else int(bad[0])
                raise ValueError(f"{where}: {column.name!r} is not finite in row {at} of its rows")
        (tokens if per_token else row_columns)[column.name] = values
    return Batch(lengths=rows.lengths, tokens=tokens, rows=row_columns)


def _check_declared(name: str, user: UserRole) -> None:
    for attribute in ("needs", "returns", "setup", "forward_step"):
        if not hasattr(user, attribute):
            raise ValueError(
                f"roles.{name}: the class {type(user).__name__} has no {attribute!r}; a role has "
                "needs, returns, setup(context) and forward_step(batch)"
            )
    for column in user.returns:
        if column.kind not in ("token", "row"):
            raise ValueError(
                f"roles.{name} declares {column.name!r} as a {column.kind} column: it can return "
                "token and row columns"
            )
