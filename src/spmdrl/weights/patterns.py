"""Patterns: the cells of tensors with equal cuts, and their routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from spmdrl.weights.cells import Cell, Cuts, cells_of, needed_bytes, split_cells
from spmdrl.weights.routes import Ranks, Route, choose_groups, find_route

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
        by_group: Counter[Ranks] = Counter()
        for pattern, count in uses.items():
            for cell, number in routed[pattern]:
                for _, group in free.routes[number].casts:
                    by_group[group] += count * cell.num_bytes
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
