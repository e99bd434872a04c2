"""Bytes that ranks stage, by route."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import torch

from spmdrl.weights.cells import Cell
from spmdrl.weights.rounds import CellRange, make_rounds
from spmdrl.weights.routes import Route, find_route

RANKS = 24


def staged(route: Route) -> Counter[int]:
    return Counter(chain(*route.sends, *(group for _, group in route.casts)))


def test_a_round_ends_where_a_rank_would_stage_more_than_a_slot() -> None:
    chance = random.Random(5)
    routes, kinds = [], set()
    for turn in range(300):
        holders = tuple(sorted(chance.sample(range(RANKS), chance.choice([1, 1, 2, 4]))))
        wanting = tuple(sorted(chance.sample(range(RANKS), chance.choice([1, 3, 8, 16]))))
        allowed = chance.choice([None, frozenset[tuple[int, ...]]()])
        routes.append(find_route(holders, wanting, turn=turn, node_size=4, allowed=allowed))
        kinds.add((len(routes[-1].sends), len(routes[-1].casts)))
    assert {(1, 1), (0, 1), (1, 0), (0, 2)} <= kinds and max(kinds)[0] > 8
    cells = tuple(
        (Cell((0,), (chance.randrange(1, 40),), torch.uint8, (0,), (1,)), number)
        for number in range(len(routes))
    )
    slot = 1000
    rounds = make_rounds([CellRange("all", 0, 0, len(cells))], [cells], routes, slot, RANKS)
    assert len(rounds) > 3
    load: Counter[int] = Counter()
    for number, [part] in enumerate(rounds):
        load.clear()
        for cell, route in cells[part.first : part.last]:
            rounded = -(-cell.num_bytes // 16) * 16
            load += Counter({r: n * rounded for r, n in staged(routes[route]).items()})
        assert max(load.values()) <= slot
        if number + 1 < len(rounds):
            cell, route = cells[part.last]
            rounded = -(-cell.num_bytes // 16) * 16
            load += Counter({r: n * rounded for r, n in staged(routes[route]).items()})
            assert max(load.values()) > slot, "the round has room for the next cell"
