"""Results and partial states of role calls that a run keeps, to resume a step at a later start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.roles.origin import Origin


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """The home result of a finished call.

    Args:
        rows: home rows; None if the result is `values`.
        places: (atom, index within the atom) of every row, `[B, 2]`; None without atoms.
        values: JSON values, equal on all ranks.
    """

    rows: Batch | None = None
    places: Tensor | None = None
    values: Any = None

    @property
    def home(self) -> Any:
        """The call's home result."""
        return self.values if self.rows is None else self.rows


@dataclass(frozen=True, kw_only=True, eq=False)
class PartialResult:
    """One rank's partial result of a stopped call.

    Args:
        rows: result rows, in the role's layout.
        values: JSON values, equal on all of the role's ranks.
        state: further state that only this rank can resume from, in the same layout.
    """

    rows: Batch | None = None
    values: Any = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Kept data of one call: a record if it was finished, else a part.

    Args:
        name: `role.method`, or the call's label.
        step: step in which it ran.
        origin: origin of the world's rows; equal on all ranks.
        writes: whether the call changes its role.
        is_ahead: made for the next step, which looks it up.
        is_foreign: the record has the rows of the whole world, which find home by their places.
        part: empty on ranks outside the role.
    """

    name: str
    step: int
    origin: Origin
    writes: bool = False
    is_ahead: bool = False
    is_foreign: bool = False
    record: Record | None = None
    part: PartialResult | None = None


@dataclass(frozen=True, kw_only=True)
class Journal:
    """The kept calls that a stop saves, and that a resumed run starts with.

    Args:
        calls: kept calls, the same ones in the same order on all ranks.
    """

    calls: tuple[Kept, ...] = ()
