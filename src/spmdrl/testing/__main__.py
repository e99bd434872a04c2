"""`python -m spmdrl.testing BACKEND`: hold a train backend to the contract, also under torchrun.

It prints a report, and ends with 1 if a clause does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from spmdrl.testing.backend_contract import CLAUSES, check_backend
from spmdrl.testing.subject import Candidate, layouts_of
from spmdrl.world import start_world, stop_world


def main(words: list[str] | None = None) -> int:
    """Check the backend that the words name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m spmdrl.testing", description=__doc__)
    parser.add_argument("backend", help="torch, megatron, deepspeed, or module:Class")
    parser.add_argument(
        "--train", metavar="JSON", type=json.loads, default={}, help="further keys of train"
    )
    parser.add_argument(
        "--only", metavar="CLAUSE", action="append", default=[], help="only this clause; repeatable"
    )
    parser.add_argument(
        "--lacks", metavar="ABILITY", action="append", default=[], help="an ability that it refuses"
    )
    parser.add_argument("--list", action="store_true", help="list the clauses, and check nothing")
    given = parser.parse_args(words)
    if given.list:
        for clause in CLAUSES:
            print(f"{clause.name}: {clause.about}")
        return 0
    return _check(given.backend, given.train, given.only, frozenset(given.lacks))


def _check(backend: str, train: dict[str, Any], only: list[str], lacks: frozenset[Any]) -> int:
    world = start_world()
    keys = {**train, "backend": backend}
    axes = Candidate(name=backend, train=keys, layouts={}).system.axes
    candidate = Candidate(
        name=backend,
        train=keys,
        layouts={size: layouts_of(axes, size) for size in range(1, world.size + 1)},
        lacks=lacks,
    )

    def told(clause: str) -> None:
        if world.is_first:
            print(f"checking {clause}", file=sys.stderr, flush=True)

    report = check_backend(candidate, world, only=only, told=told)
    if world.is_first:
        print("\n".join(report.lines()), flush=True)
    stop_world()
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
