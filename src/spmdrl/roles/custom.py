"""Users' own roles: a class with a few functions, placed on ranks like any other role."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.config.user_objects import lacks, make_object
from spmdrl.distributed.mesh import Mesh
from spmdrl.distributed.row_bytes import Column
from spmdrl.memory.call_memory import CallMemory
from spmdrl.roles.calls import Call, role_method
from spmdrl.roles.ledger import Stint

FORWARD = "forward_step"

NEEDED = {"setup": ("context",), FORWARD: ("batch",)}
OPTIONAL = {
    "train_step": ("batch",),
    "eval_step": ("batch",),
    "save_state": (),
    "load_state": ("tensors",),
}
"""Functions that a role must have, and those that it may have -> the arguments of their calls."""

SCORES = "scores"
"""Row column that a role returns if `rewards` names it."""

DECLARED = "declared"
"""Name of a user's role's only part, of which the plan knows only the size."""


@dataclass(frozen=True, kw_only=True)
class Custom:
    """Facts about a user's own role that the plan needs.

    Args:
        num_bytes: bytes on the device of each of its ranks; None: the role does not say.
        device_type: device on which it computes.
        ranks: its ranks.
    """

    num_bytes: int | None
    device_type: str
    ranks: Collection[int]


@dataclass(frozen=True, kw_only=True)
class RoleContext:
    """Arguments of a user's role on the ranks where it runs.

    Args:
        name: name of the role in the configuration.
        mesh: its ranks and groups; each replica (`dp`) gets its own rows.
        device: device on which this rank computes.
        model: the directory that `roles.NAME.model` or `model.path` names.
        seed: seed of the run.
    """

    name: str
    mesh: Mesh
    device: torch.device
    model: Path
    seed: int


class UserRole(Protocol):
    """Interface of the class behind `kind: module:Class`. Every rank makes one with
    `roles.NAME.options` as keyword arguments; `setup` and the steps run only on the role's ranks.

    `needs` names the columns sent to the role: tensors, or texts (`prompt_text`, `response`,
    `answer`). `returns` declares the columns that come home. Optional interfaces: `Trains`,
    `Evaluates`, `Saves` and `Loads` (both, or neither), `Sized`.
    """

    needs: Sequence[str]
    returns: Sequence[Column]

    def setup(self, context: RoleContext) -> None: ...

    def forward_step(self, batch: Batch) -> Mapping[str, Tensor]:
        """The columns of `returns` for these rows: token columns `[T]`, row columns `[B]`."""


@runtime_checkable
class Trains(Protocol):
    """A role that learns: `train_step` may change it, and returns metrics."""

    def train_step(self, batch: Batch) -> Mapping[str, float]: ...


@runtime_checkable
class Evaluates(Protocol):
    """A role whose `eval_step` evaluations call in place of `forward_step`."""

    def eval_step(self, batch: Batch) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Saves(Protocol):
    """A role with state: every checkpoint holds its tensors by name, separately for each rank."""

    def save_state(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Loads(Protocol):
    """A role that takes its saved tensors back, on the same ranks and after `setup`."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class Sized(Protocol):
    """A role that declares, as soon as it is made, the bytes that each of its ranks occupies on its
    device from `setup` on: the memory plan counts them and refuses what does not fit.
    """

    device_bytes: int


def declared_bytes(user: UserRole) -> int | None:
    """Bytes that the role declares per rank; None: it declares none."""
    return user.device_bytes if isinstance(user, Sized) else None


def make_user_role(name: str, where: str, options: Mapping[str, Any]) -> UserRole:
    """Make and check the object behind `kind: module:Class`.

    Raises:
        ValueError: it cannot be made with these options; something that a role needs is missing, or
            does not take the arguments of its calls; or it only saves, or only loads.
    """
    user: UserRole = make_object(where, options, f"roles.{name}.kind", f"roles.{name}.options")
    try:
        check_user_role(name, user)
    except ValueError as error:
        raise ValueError(f"{error} ({where})") from None
    return user


class CustomRole:
    """Handle of a user's role.

    Methods: `forward(batch)` and `evaluate(batch)` return the declared columns of the home rows;
    `train(batch)` returns `train_step`'s metrics.
    """

    def __init__(
        self, name: str, mesh: Mesh, user: UserRole, memory: CallMemory | None = None
    ) -> None:
        self.name, self.mesh, self.user, self.memory = name, mesh, user, memory
        check_user_role(name, user)

    def state(self) -> dict[str, Tensor]:
        """The role's tensors on this rank that a checkpoint keeps."""
        if not self.mesh.is_member or not isinstance(self.user, Saves):
            return {}
        return dict(self.user.save_state())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned on this rank."""
        if not tensors:
            return
        if not isinstance(self.user, Loads):
            raise ValueError(
                f"roles.{self.name}: the checkpoint has {sorted(tensors)} of it, and the class "
                f"{type(self.user).__name__} has no load_state: give it save_state and load_state "
                "as when the checkpoint was written, or start anew (checkpoint.resume=false)"
            )
        self.user.load_state(tensors)

    @role_method
    def forward(self, batch: Batch) -> Call[Batch]:
        return self._columns(batch, FORWARD, self.user.forward_step)

    @role_method
    def evaluate(self, batch: Batch) -> Call[Batch]:
        if isinstance(self.user, Evaluates):
            return self._columns(batch, "eval_step", self.user.eval_step)
        return self.forward.on(batch)

    def _columns(
        self, batch: Batch, method: str, step: Callable[[Batch], Mapping[str, Tensor]]
    ) -> Call[Batch]:
        returns = tuple(self.user.returns)

        def compute(rows: Batch, stint: Stint) -> Batch | None:
            columns = checked_columns(f"{self.name}.{method}", rows, step(rows), returns)
            return columns if returns else None

        def finish(home: Batch | None) -> Batch:
            return Batch(lengths=batch.lengths) if home is None else home

        return Call(
            role=self,
            method=method,
            batch=batch,
            needs=tuple(self.user.needs),
            returns=returns,
            compute=compute,
            finish=finish,
            atom=batch["prompt_ids"],
        )

    @role_method
    def train(self, batch: Batch) -> Call[dict[str, float]]:
        user = self.user
        if not isinstance(user, Trains):
            raise ValueError(
                f"roles.{self.name} ({type(user).__name__}) has no train_step: add "
                "train_step(batch) -> metrics to the class, or do not train it"
            )

        def compute(rows: Batch, stint: Stint) -> dict[str, float]:
            return checked_metrics(f"{self.name}.train_step", user.train_step(rows))

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
    """Check a role's columns and pack them as rows that can go home.

    Raises:
        ValueError: a declared column is missing, is not a tensor, has not one entry per token or
            row, has a value that is not finite or does not fit its dtype (the first bad row is
            named), or is of another kind of number than declared.
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
        own = values.detach().cpu()
        bad = _bad_entries(f"{where}: {column.name!r}", own, column)
        if len(bad):
            at = int(rows.row_of_token()[bad[0]]) if per_token else int(bad[0])
            fault = "is not finite" if values.is_floating_point() else f"exceeds {column.dtype}"
            raise ValueError(f"{where}: {column.name!r} {fault} in row {at} of its rows")
        (tokens if per_token else row_columns)[column.name] = own.to(column.dtype)
    return Batch(lengths=rows.lengths, tokens=tokens, rows=row_columns)


def _bad_entries(what: str, values: Tensor, column: Column) -> Tensor:
    """Indices along the first dim of values that the column's dtype cannot hold, int64.

    Raises:
        ValueError: the dtype holds another kind of number, so a cast would change the values.
    """
    given, wanted = values.dtype, column.dtype
    if not torch.can_cast(given, wanted):
        raise ValueError(
            f"{what} is {given}, but is declared {wanted}: return that, or declare the other "
            "(Column(..., dtype=...))"
        )
    if wanted.is_floating_point:
        bad = ~torch.isfinite(values.to(wanted))
    else:
        bad = values.to(wanted).to(given) != values if given != wanted else values != values
    return bad.flatten(1).any(1).nonzero().flatten() if bad.dim() > 1 else bad.nonzero().flatten()


def checked_metrics(where: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Convert the metrics that `train_step` returned to plain numbers, which a checkpoint can keep.

    Raises:
        ValueError: they are not a mapping, or an entry is not a number; the key is named.
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{where} returned a {type(metrics).__name__}: return a dict of numbers")
    found = {}
    for key, value in metrics.items():
        try:
            found[str(key)] = float(value)
        # the error depends on the value: a tensor of many values, a text, None
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{where} returned {key!r} as a {type(value).__name__}, which is no number: {error}"
            ) from None
    return found


def check_scores(name: str, user: UserRole) -> None:
    """Check that `rewards` may name a role.

    Raises:
        ValueError: it does not declare a row column `scores` with one number per row.
    """
    declared = {column.name: column for column in user.returns}
    wish = f"Column(name={SCORES!r}, kind='row')"
    if SCORES not in declared:
        raise ValueError(
            f"rewards name the role {name!r}, but the class {type(user).__name__} returns "
            f"{sorted(declared)}: add {wish} to its `returns`"
        )
    column = declared[SCORES]
    if column.kind != "row" or column.shape != ():
        raise ValueError(
            f"rewards name the role {name!r}, but the class {type(user).__name__} declares "
            f"{SCORES!r} as a {column.kind} column of the shape {column.shape}: declare {wish}"
        )


def _are_all(kind: type, values: object) -> bool:
    """Whether `values` is a collection of such values; a text does not count as one of texts."""
    if not isinstance(values, Collection) or isinstance(values, str):
        return False
    return all(isinstance(value, kind) for value in values)


def check_user_role(name: str, user: UserRole) -> None:
    """Check the interface of a user's role. ValueError names the role, the class and the fault."""
    where = f"roles.{name}: the class {type(user).__name__}"
    offered = {attribute for attribute in dir(user) if not attribute.startswith("_")}
    for attribute in ("needs", "returns", "setup", "forward_step"):
        if attribute not in offered:
            raise ValueError(
                f"{where} has no {attribute!r}; a role has needs, returns, setup(context) and "
                "forward_step(batch)"
            )
    if not _are_all(str, user.needs):
        raise ValueError(f"{where} has needs={user.needs!r}: make it a tuple of columns' names")
    if not _are_all(Column, user.returns):
        raise ValueError(
            f"{where} has returns={user.returns!r}: make it a tuple of Column(name=..., kind=...)"
        )
    size = declared_bytes(user)
    if size is not None and (not isinstance(size, int) or size < 0):
        raise ValueError(f"{where} has device_bytes={size!r}: give a whole number of bytes")
    for one, other in (("save_state", "load_state"), ("load_state", "save_state")):
        if one in offered and other not in offered:
            raise ValueError(
                f"{where} has {one!r} and no {other!r}, so a run could not resume from its "
                f"checkpoints: add {other!r}, or take {one!r} away"
            )
    lacking = lacks(user, NEEDED, OPTIONAL)
    if lacking is not None:
        raise ValueError(f"{where} {lacking}")
    for column in user.returns:
        if column.kind not in ("token", "row"):
            raise ValueError(
                f"roles.{name} declares {column.name!r} as a {column.kind} column: it can return "
                "token and row columns"
            )
