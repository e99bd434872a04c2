"""What a run keeps of its role calls for a start that goes on in their step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spmdrl.batch import Batch
from spmdrl.origin import Origin


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """What came home of a finished call.

    Args:
        rows: home rows; None where the result is `values`.
        places: (atom, place within the atom) of every row, `[B, 2]`; None without atoms.
        values: JSON values, equal on all ranks.
    """

    rows: Batch | None = None
    places: Tensor | None = None
    values: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What a call that was stopped has left on one rank.

    Args:
        rows: of its results, in the role's layout.
        values: JSON values, equal on all of the role's ranks.
        state: what this rank alone can go on from, in the same layout.
    """

    rows: Batch | None = None
    values: Any = None
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What is kept of one call: a record where it was finished, else a part.

    Args:
        name: `role.method`, or the call's label.
        step: in which it ran.
        origin: of the world's rows; equal on all ranks.
        writes: whether the call changes its role.
        is_ahead: made for the next step, which looks it up.
        is_foreign: a record's rows are those of the whole world, and find home by their places.
        part: on ranks outside the role an empty one.
    """

    name: str
    step: int
    origin: Origin
    writes: bool = False
    is_ahead: bool = False
    is_foreign: bool = False
    record: Record | None = None
    part: Part | None = None


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What a stop saves of the calls, and a resumed run begins with.

    Args:
        calls: as many, in one order, on all ranks.
    """

    calls: tuple[Kept, ...] = ()
