"""`spmdrl doctor` names the nodes that are bad, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import run_ranks
from spmdrl.commands.doctor import Diagnosis, Report, diagnose, doctor
from spmdrl.world import World


def report(rank: int, *problems: str, torch: str = "2.13", node: str | None = None) -> Report:
    return Report(rank=rank, node=node or f"n{rank}", versions={"torch": torch}, problems=problems)


def ring(count: int, slow: set[int], speed: float = 10.0) -> dict[tuple[int, int], float]:
    """Neighbours' speeds: 1 where one of them is slow."""
    pairs = [(a, (a + 1) % count) for a in range(count)]
    return {pair: 1.0 if slow.intersection(pair) else speed for pair in pairs}


@pytest.mark.parametrize(
    ("reports", "intra", "inter", "bad", "words"),
    [
        ([report(r) for r in range(3)], [50.0] * 3, ring(3, set()), (), "n0 and n1: all-reduce"),
        (
            [report(0), report(1, "/dev/shm has 0.06 GB free"), report(2)],
            [50.0] * 3,
            ring(3, set()),
            ("n1",),
            "n1, rank 1: /dev/shm",
        ),
        (
            [report(0), report(1), report(2, torch="2.12")],
            [],
            ring(3, set()),
            ("n2",),
            "n2, rank 2: torch is 2.12, and 2.13 on most ranks",
        ),
        ([report(r) for r in range(3)], [50, 3, 50], {}, ("n1",), "n1: that is below 20 GB/s"),
        # of the pairs (1, 2) and (2, 3) only node 2 is slow with all that it was tried with
        ([report(r) for r in range(4)], [], ring(4, {2}), ("n2",), "n1 and n2: that is below 5"),
        ([report(r) for r in range(2)], [], {(0, 1): 1.0}, ("n0", "n1"), "n0 and n1: that is"),
    ],
)
def test_who_is_bad(
    reports: list[Report],
    intra: list[float],
    inter: dict[tuple[int, int], float],
    bad: tuple[str, ...],
    words: str,
) -> None:
    nodes = [r.node for r in reports]
    found = diagnose(reports, nodes, intra, inter, min_intra=20, min_inter=5)
    assert found.bad == bad
    assert any(words in line for line in found.lines), found.lines


def test_a_note_is_printed_and_makes_no_node_bad() -> None:
    noted = Report(rank=0, node="n0", versions={}, problems=(), notes=("torch finds an xpu",))
    found = diagnose([noted], ["n0"], [], {})
    assert found == Diagnosis(lines=("n0, rank 0: torch finds an xpu",), bad=())


def examine(world: World, shared: Path, name: str) -> Diagnosis:
    if world.rank == 1 and name == "blind":
        shared = shared / "elsewhere"  # as if it were not mounted there
    return doctor(world, shared=shared, min_intra=1e9 if name == "slow" else 0.0)


def test_two_ranks_are_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_ranks(examine, 2, tmp_path, "well")
    assert first == second and first.bad == ()
    assert any("all-reduce within the node" in line for line in first.lines)
    assert list(tmp_path.iterdir()) == []
    first, _ = run_ranks(examine, 2, tmp_path, "slow")
    assert len(first.bad) == 1
