"""Flat ranges of parameters as boxes of the name space.

Optimizers that cut flat buffers into equal parts do so without regard to shapes. A range of a
flattened parameter is at most three boxes of it, which layouts, syncs and checkpoints can read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from spmdrl.models.tensors import Slice, restrict


class Sliced(Protocol):
    """A parameter with one dim or two, and the slices of the name space in its rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def slices(self) -> tuple[Slice, ...]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatPiece:
    """A box of a parameter's own shape that a flat range of the parameter contains entirely.

    Args:
        start, stop: range of its values in the flattened parameter.
        shape: shape of the box.
        slices: slices of the name space in the box.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


def flat_pieces(parameter: Sliced, start: int, stop: int) -> list[FlatPiece]:
    """Cut values `[start, stop)` of a flattened parameter into boxes: the end of a row, whole rows,
    the beginning of a row.
    """
    width = math.prod(parameter.shape[1:])
    row = -(-start // width)
    cuts = sorted({start, min(row * width, stop), max(stop // width * width, start), stop})
    pieces = []
    for a, b in pairwise(cuts):
        rows, column = (a // width, -(-b // width)), a % width
        columns = (column, column + min(b - a, width))
        shape = (rows[1] - rows[0], *parameter.shape[1:])
        slices = restrict(parameter.slices, *rows)
        if len(parameter.shape) > 1:
            shape = (shape[0], columns[1] - columns[0])
            slices = _columns(slices, *columns)
        pieces.append(FlatPiece(start=a, stop=b, shape=shape, slices=slices))
    return pieces


def _columns(held: Iterable[Slice], first: int, last: int) -> tuple[Slice, ...]:
    """Restrict the last dim of slices, which is the columns of the local tensor."""
    return tuple(
        replace(
            piece,
            start=(*piece.start[:-1], piece.start[-1] + first),
            stop=(*piece.stop[:-1], piece.start[-1] + last),
        )
        for piece in held
    )
