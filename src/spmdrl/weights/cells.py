"""Cells: the boxes left of a tensor when it is cut at every boundary of both layouts.

Layers are alike, and so are their cells: tensors with the same cuts share one list (a pattern), so
a plan costs as much as one layer.

Patterns: the cells of tensors with equal cuts, and their routes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import sub

import torch

from spmdrl.models.local_shards import Kinds, Table, WeightLayout
from spmdrl.weights.layout import kinds_of
from spmdrl.weights.routes import Ranks, Route, choose_groups, find_route

Point = tuple[int, ...]
"""One index per dim."""

_Held = tuple[Point, Point, torch.dtype, Ranks]
"""Start and stop of a slice, its dtype, and the ranks that hold (or want) it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A box `[start, stop)` of a tensor, which no slice cuts.

    Args:
        dtype: dtype in which it is sent.
        holders: ranks of the source that hold it.
        wanting: ranks of the target that want it in `dtype`.
    """

    start: Point
    stop: Point
    dtype: torch.dtype
    holders: Ranks
    wanting: Ranks

    @property
    def num_bytes(self) -> int:
        values: int = math.prod(map(sub, self.stop, self.start))
        return values * self.dtype.itemsize


@dataclass(frozen=True)
class Cuts:
    """One tensor's slices in both layouts; tensors with equal cuts move alike."""

    shape: Point
    frozen: bool
    source: tuple[_Held, ...]
    target: tuple[_Held, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.shape, self.frozen, self.source, self.target))


def find_cuts(
    source: WeightLayout,
    target: WeightLayout,
    shared: Mapping[int, frozenset[str]],
    computed: Collection[str] = (),
) -> dict[str, Cuts]:
    """Hugging Face name -> cuts, for every tensor that the target does not share, in its order.

    Args:
        computed: names of tensors that change although the source's own tensors are frozen.
    """
    nothing: frozenset[str] = frozenset()
    targets = _group((table, shared[rank], rank) for rank, table in target.items())
    sources = _group((table, nothing, rank) for rank, table in source.items())
    firsts = _first_alike((*targets, *sources), frozenset(computed))
    wanted, held = _distinct(targets, firsts), _distinct(sources, firsts)
    cuts: dict[str, Cuts] = {}
    for name, first in firsts.items():
        if first not in wanted:
            continue
        if first not in cuts:
            shape, boxes, _ = wanted[first]
            shape_there, pieces, frozen = held.get(first, (shape, {}, False))
            if shape_there != shape:
                raise ValueError(
                    f"weight sync: the target's {name} {shape} has the shape {shape_there} at the "
                    "source: are both roles of one model?"
                )
            stays = frozen and first not in computed
            cuts[first] = Cuts(shape, stays, _in_order(pieces), _in_order(boxes))
        cuts[name] = cuts[first]
    return cuts


def cells_of(name: str, cuts: Cuts) -> tuple[Cell, ...]:
    """The cells that some rank wants, in row-major order.

    Raises:
        ValueError: the source lacks a cell, or holds one in several dtypes.
    """
    grid = [_boundaries(cuts, dim) for dim in range(len(cuts.shape))]
    held = _by_cell(cuts.source, grid)
    wanted = _by_cell(cuts.target, grid)
    lacking = sum(_numel(at, grid) for at in wanted if at not in held)
    if lacking:
        total = sum(_numel(at, grid) for at in wanted)
        raise ValueError(
            f"weight sync: the source holds {total - lacking} of the {total} values of {name} "
            f"{cuts.shape} that the target needs: are both roles of one model?"
        )
    unions: dict[tuple[Ranks, ...], Ranks] = {}
    cells = []
    for at, wishes in sorted(wanted.items()):
        dtypes = {dtype for dtype, _ in held[at]}
        if len(dtypes) > 1:
            raise ValueError(f"weight sync: the source holds {name} in several dtypes: {dtypes}")
        holders = _union((ranks for _, ranks in held[at]), unions)
        start = tuple(grid[dim][i] for dim, i in enumerate(at))
        stop = tuple(grid[dim][i + 1] for dim, i in enumerate(at))
        for dtype, wanting in _by_dtype(dtypes.pop(), wishes, unions):
            cells.append(Cell(start, stop, dtype, holders, wanting))
    return tuple(cells)


def split_cells(cells: Iterable[Cell], most_bytes: int) -> tuple[Cell, ...]:
    """Split cells to `most_bytes` (or one index), ordered so that all holders can start at once."""
    chunks: list[tuple[float, int, Cell]] = []
    for number, cell in enumerate(cells):
        dim = next((d for d, (a, b) in enumerate(_ranges(cell)) if b - a > 1), 0)
        low, high = _ranges(cell)[dim] if cell.start else (0, 1)
        count = min(high - low, -(-cell.num_bytes // most_bytes))
        if count <= 1:
            chunks.append((0.0, number, cell))
            continue
        for i in range(count):
            first = low + (high - low) * i // count
            last = low + (high - low) * (i + 1) // count
            chunk = Cell(
                (*cell.start[:dim], first, *cell.start[dim + 1 :]),
                (*cell.stop[:dim], last, *cell.stop[dim + 1 :]),
                cell.dtype,
                cell.holders,
                cell.wanting,
            )
            chunks.append((i / count, number, chunk))
    return tuple(cell for _, _, cell in sorted(chunks, key=lambda chunk: chunk[:2]))


def needed_bytes(cuts: Cuts, cells: Sequence[Cell]) -> int:
    """Bytes that target ranks want and do not hold, each in the (widest) dtype that it wants."""
    lacking = [(cell, set(cell.wanting).difference(cell.holders)) for cell in cells]
    sizes = {dtype.itemsize for _, _, dtype, _ in cuts.target}
    if len(sizes) == 1:
        [size] = sizes
        return sum(cell.num_bytes // cell.dtype.itemsize * size * len(r) for cell, r in lacking)
    widest: dict[int, int] = {}
    for _, _, dtype, ranks in cuts.target:
        for rank in ranks:
            widest[rank] = max(widest.get(rank, 0), dtype.itemsize)
    return sum(
        cell.num_bytes // cell.dtype.itemsize * sum(widest[rank] for rank in ranks)
        for cell, ranks in lacking
    )


@dataclass(frozen=True)
class _Group:
    """Ranks that have the same table and omit the same local names of it."""

    table: Table
    kinds: Kinds
    left_out: frozenset[str]
    ranks: list[int]

    @property
    def key(self) -> tuple[int, int]:
        """Key of the group; groups with equal keys name their tensors alike."""
        return id(self.kinds), id(self.left_out)


Boxes = dict[tuple[Point, Point, torch.dtype], list[int]]


def _group(tables: Iterable[tuple[Table, frozenset[str], int]]) -> list[_Group]:
    groups: dict[tuple[int, int], _Group] = {}
    for table, left_out, rank in tables:
        at = (id(table), id(left_out))
        if at not in groups:
            groups[at] = _Group(table, kinds_of(table), left_out, [])
        groups[at].ranks.append(rank)
    return list(groups.values())


def _first_alike(groups: Iterable[_Group], computed: frozenset[str]) -> dict[str, str]:
    """Name -> the first name with the same kinds in all tables, in order; all computed or none."""
    kinds: dict[str, list[tuple[int, Hashable, int]]] = {}
    for number, group in enumerate({group.key: group for group in groups}.values()):
        for local_name, (kind, names) in group.kinds.items():
            if local_name not in group.left_out:
                for i, name in enumerate(names):
                    kinds.setdefault(name, []).append((number, kind, i))
    firsts: dict[object, str] = {}
    return {
        name: firsts.setdefault((name in computed, *found), name) for name, found in kinds.items()
    }


def _distinct(
    groups: Iterable[_Group], firsts: Mapping[str, str]
) -> dict[str, tuple[Point, Boxes, bool]]:
    """Global shape, distinct boxes with the ranks that have them, and whether it is frozen, of the
    first tensor of each kind, by its name.
    """
    found: dict[str, tuple[Point, Boxes, bool]] = {}
    visited: dict[tuple[int, int], list[str]] = {}
    for group in groups:
        if group.key not in visited:
            visited[group.key] = [
                local_name
                for local_name, (_, names) in group.kinds.items()
                if local_name not in group.left_out and any(firsts[n] == n for n in names)
            ]
        for local_name in visited[group.key]:
            held = group.table[local_name]
            for piece in held.slices:
                if firsts[piece.name] != piece.name:
                    continue
                shape, boxes, frozen = found.get(piece.name, (piece.shape, {}, False))
                found[piece.name] = (shape, boxes, frozen or held.frozen)
                box = (piece.start, piece.stop, held.dtype)
                boxes.setdefault(box, []).extend(group.ranks)
    return found


def _in_order(boxes: Boxes) -> tuple[_Held, ...]:
    return tuple((*box, tuple(sorted(set(ranks)))) for box, ranks in boxes.items())


def _boundaries(cuts: Cuts, dim: int) -> list[int]:
    both = (*cuts.source, *cuts.target)
    return sorted({cut[0][dim] for cut in both} | {cut[1][dim] for cut in both})


def _by_cell(
    cuts: Sequence[_Held], grid: Sequence[Sequence[int]]
) -> dict[Point, list[tuple[torch.dtype, Ranks]]]:
    """Cell (its index along each dim of the grid) -> the cuts that cover it."""
    places = [{bound: i for i, bound in enumerate(bounds)} for bounds in grid]
    covered: dict[Point, list[tuple[torch.dtype, Ranks]]] = {}
    for start, stop, dtype, ranks in cuts:
        spans = [range(at[a], at[b]) for at, a, b in zip(places, start, stop, strict=True)]
        for cell in product(*spans):
            covered.setdefault(cell, []).append((dtype, ranks))
    return covered


def _numel(at: Point, grid: Sequence[Sequence[int]]) -> int:
    return math.prod(grid[dim][i + 1] - grid[dim][i] for dim, i in enumerate(at))


def _by_dtype(
    source: torch.dtype,
    wishes: Sequence[tuple[torch.dtype, Ranks]],
    unions: dict[tuple[Ranks, ...], Ranks],
) -> list[tuple[torch.dtype, Ranks]]:
    """Dtypes that travel, and to whom: the wanted dtype if it is narrower, else the source's."""
    dtypes = {dtype for dtype, _ in wishes}
    if len(dtypes) == 1:
        [wish] = dtypes
        wanting = _union((ranks for _, ranks in wishes), unions)
        return [(wish if wish.itemsize < source.itemsize else source, wanting)]
    by_rank: dict[int, set[torch.dtype]] = {}
    for dtype, ranks in wishes:
        for rank in ranks:
            by_rank.setdefault(rank, set()).add(dtype)
    travels: dict[torch.dtype, list[int]] = {}
    for rank, wanted in by_rank.items():
        # a rank that wants the box in several dtypes gets it once, in full precision
        one = next(iter(wanted)) if len(wanted) == 1 else source
        travels.setdefault(one if one.itemsize < source.itemsize else source, []).append(rank)
    return [(dtype, tuple(sorted(ranks))) for dtype, ranks in travels.items()]


def _union(sets: Iterable[Ranks], known: dict[tuple[Ranks, ...], Ranks]) -> Ranks:
    key = tuple(sets)
    if len(key) == 1:
        return key[0]
    if key not in known:
        known[key] = tuple(sorted(set().union(*key)))
    return known[key]


def _ranges(cell: Cell) -> tuple[tuple[int, int], ...]:
    return tuple(zip(cell.start, cell.stop, strict=True))


Pattern = tuple[tuple[Cell, int], ...]
"""Cells of a tensor, each with the number of its route."""

_TURNS = 4
"""Consecutive layers that take different ones of several equal ranks to serve a cell."""


class Patterns:
    """Distinct lists of cells. Tensors with equal cuts share `_TURNS` of them, in turn."""

    def __init__(self, node_size: int, most_bytes: int) -> None:
        self._node_size, self._most_bytes = node_size, most_bytes
        self._known: dict[Cuts, tuple[tuple[Cell, ...], int]] = {}
        self._uses: Counter[Cuts] = Counter()
        self._numbers: dict[tuple[Cuts, int], int] = {}
        self._cells: list[tuple[tuple[Cell, ...], int]] = []
        """Cells, and the turn of the first."""
        self.needed_bytes: list[int] = []
        """Bytes that the receivers of each pattern need, in the target's dtype."""

    def add(self, name: str, cuts: Cuts) -> tuple[int, int]:
        """Add a tensor; returns its pattern's number, and the number of its cells."""
        if cuts not in self._known:
            whole = cells_of(name, cuts)
            self._known[cuts] = split_cells(whole, self._most_bytes), needed_bytes(cuts, whole)
        cells, needed = self._known[cuts]
        turn = self._uses[cuts] % _TURNS
        self._uses[cuts] += 1
        if (cuts, turn) not in self._numbers:
            self._numbers[cuts, turn] = len(self._cells)
            self._cells.append((cells, turn))
            self.needed_bytes.append(needed)
        return self._numbers[cuts, turn], len(cells)

    def route(
        self, uses: Mapping[int, int]
    ) -> tuple[tuple[Pattern, ...], tuple[Route, ...], tuple[Ranks, ...]]:
        """Every pattern with routes, all routes, and the groups that broadcast.

        Args:
            uses: pattern -> number of tensors that have it.
        """
        free = _Routes(self._node_size, None)
        routed = [free.number_all(cells, turn) for cells, turn in self._cells]
        by_route: Counter[int] = Counter()
        for pattern, count in uses.items():
            for cell, number in routed[pattern]:
                by_route[number] += count * cell.num_bytes
        by_group: Counter[Ranks] = Counter()
        for number, num_bytes in by_route.items():
            for _, group in free.routes[number].casts:
                by_group[group] += num_bytes
        groups = choose_groups(by_group)
        if len(groups) == len(by_group):
            return tuple(routed), tuple(free.routes), groups
        bound = _Routes(self._node_size, frozenset(groups))
        routed = [bound.number_all(cells, turn) for cells, turn in self._cells]
        return tuple(routed), tuple(bound.routes), groups


class _Routes:
    """Distinct routes, by number."""

    def __init__(self, node_size: int, allowed: frozenset[Ranks] | None) -> None:
        self._node_size, self._allowed = node_size, allowed
        self._asked: dict[tuple[Ranks, Ranks, int], int] = {}
        self._numbers: dict[Route, int] = {}
        self.routes: list[Route] = []

    def number_all(self, cells: Sequence[Cell], turn: int) -> Pattern:
        return tuple((c, self._number(c.holders, c.wanting, turn + i)) for i, c in enumerate(cells))

    def _number(self, holders: Ranks, wanting: Ranks, turn: int) -> int:
        # turns repeat after one entry for each pair of wanting rank and holder
        question = (holders, wanting, turn % (len(wanting) * len(holders)))
        number = self._asked.get(question)
        if number is None:
            route = find_route(
                holders, wanting, turn=turn, node_size=self._node_size, allowed=self._allowed
            )
            number = self._numbers.setdefault(route, len(self.routes))
            if number == len(self.routes):
                self.routes.append(route)
            self._asked[question] = number
        return number
